"""The passes of a training step around its matrix products, compiled for this machine's processor.

`native.c` has them, each the counterpart of a chain of operations in plain PyTorch, which is its specification. The
machine's C compiler builds it in a second when the first step asks for it; nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError

_SOURCE = Path(__file__).with_suffix(".c")
# vector instructions where the source asks for them; sums are reordered there alone, and NaN stays NaN
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def why_not() -> str | None:
    """Why the passes cannot be compiled here, as a sentence; None where they can."""
    built = _built()
    return built if isinstance(built, str) else None


@functools.cache
def _built() -> ctypes.CDLL | str:
    """The compiled passes, or why there are none."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "engine native needs a C compiler and none was found; install one, name it in CC, or use engine fused"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native.so"
        try:
            subprocess.run(
                [compiler, *_FLAGS, "-o", str(path), str(_SOURCE), "-lm"], check=True, capture_output=True, text=True
            )
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0][:160]
            return f"engine native could not compile its passes ({said}); use engine fused"


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function: tensors as pointers to their first value, whole numbers as int64, others as float32."""
    function = _functions.get(name) or _typed(name, arguments)
    function(*(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments))


# functions by name, with their types; those of one name are always the same
_functions: dict[str, Any] = {}


def _typed(name: str, arguments: Sequence[Tensor | int | float]) -> Any:
    """The function of this name, which takes arguments of these types."""
    library = _built()
    if isinstance(library, str):
        raise InputError(library)
    function = getattr(library, name)
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p if isinstance(value, Tensor) else ctypes.c_int64 if isinstance(value, int) else ctypes.c_float
        for value in arguments
    ]
    _functions[name] = function
    return function


def gather(store: Tensor, slots: Tensor, out: Tensor, copy: Tensor, means: Tensor) -> None:
    """Rows of a store, twice, and their means.

    Args:
        store: (S, D), contiguous.
        slots: int64 (T, n).
        out: (T, n, D), written.
        copy: written too, with the strides of `out`; may be `out`.
        means: (T, n, 1), written.
    """
    trials, rows, dim = out.shape
    _call("gather", store, slots.contiguous(), out, copy, means, trials, rows, dim, out.stride(0), means.stride(0))


def inverse_lengths(rows: Tensor, out: Tensor) -> None:
    """1 / length of rows (T, n, D), written to (T, n); see :func:`ulfine_fast.core.fused.heads.inverse_lengths`."""
    trials, count, dim = rows.shape
    _call("inverse_lengths", rows, out, trials, count, dim, rows.stride(0), out.stride(0))


def copy_and_measure(rows: Tensor, copy: Tensor, out: Tensor) -> None:
    """Copy rows (T, n, D) to contiguous memory, and write 1 / length of each to (T, n), contiguous."""
    trials, count, dim = rows.shape
    _call("copy_and_measure", rows, copy, out, trials, count, dim, rows.stride(0))


def adapter_prepare(down: Tensor, scale: Tensor, shift: Tensor, first: Tensor, sums: Tensor, offset: Tensor) -> None:
    """Fold the norm's scale into the adapter's down matrix.

    Args:
        down: W (T, D, r).
        scale: a (T, D, 1).
        shift: b (T, D, 1).
        first: a W (T, D, r), written.
        sums: sum_d (a W)_d (T, 1, r), written.
        offset: b W (T, 1, r), written.
    """
    trials, dim, rank = down.shape
    _call("adapter_prepare", down, scale, shift, first, sums, offset, trials, dim, rank, down.stride(0))


def adapter_hidden_(
    hidden: Tensor,
    mean: Tensor,
    inverse: Tensor,
    shifted: Tensor,
    sums: Tensor,
    offset: Tensor,
    strength: Tensor,
    mean_square: float,
) -> None:
    """Turn products x (a W) into s relu(r x (a W) + b W - m r sums), in place.

    Args:
        hidden: x (a W) (T, n, r); overwritten.
        mean: m (T, n, 1).
        inverse: r (T, n, 1), written.
        shifted: m r (T, n, 1), written.
        sums: (T, 1, r).
        offset: b W (T, 1, r).
        strength: s (T, 1, 1).
        mean_square: of a row, with the norm's epsilon.
    """
    trials, rows, rank = hidden.shape
    strides = hidden.stride(0), mean.stride(0)
    _call(
        "adapter_hidden", hidden, mean, inverse, shifted, sums, offset, strength, mean_square,
        trials, rows, rank, *strides,
    )  # fmt: skip


def adapter_hidden_gradient_(
    inner: Tensor,
    hidden: Tensor,
    inverse: Tensor,
    shifted: Tensor,
    strength: Tensor,
    sums: Tensor,
    drift: Tensor,
) -> None:
    """The gradient of relu's input, and its sums over rows.

    Args:
        inner: gradient of s relu's output (T, n, r); becomes that of relu's input, times r.
        hidden: s relu's output (T, n, r).
        inverse: r (T, n, 1).
        shifted: m r (T, n, 1).
        strength: s (T, 1, 1).
        sums: of the input's gradient (T, 1, r), written.
        drift: of the input's gradient times m r (T, 1, r), written.
    """
    trials, rows, rank = inner.shape
    strides = hidden.stride(0), inverse.stride(0)
    _call(
        "adapter_hidden_gradient", inner, hidden, inverse, shifted, strength, sums, drift, trials, rows, rank, *strides
    )


def adapter_gradients(
    quotient: Tensor,
    drift: Tensor,
    sums: Tensor,
    parameters: Sequence[Tensor],
    velocity: Sequence[Tensor],
    momentum: float,
) -> None:
    """Move the velocities of W, a and b to momentum * velocity + gradient.

    Args:
        quotient: Q + drift (T, D, r).
        drift: (T, 1, r).
        sums: (T, 1, r).
        parameters: W (T, D, r), a and b (T, D, 1).
        velocity: of W (T, D, r), a and b (T, D).
        momentum: of all trials.
    """
    trials, dim, rank = quotient.shape
    stride = parameters[0].stride(0)
    _call("adapter_gradients", quotient, drift, sums, *parameters, *velocity, momentum, trials, dim, rank, stride)


def scale_logits_(logits: Tensor, row_scale: Tensor, column_scale: Tensor) -> None:
    """Logits (T, n, M) times factors of rows (T, n, 1) and of vectors (T, 1, M)."""
    trials, rows, columns = logits.shape
    strides = logits.stride(0), row_scale.stride(0)
    _call("scale_logits", logits, row_scale, column_scale, trials, rows, columns, *strides)


def cross_entropy_gradient(
    logits: Tensor, adjustment: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor, log_probabilities: Tensor
) -> None:
    """See :func:`ulfine_fast.core.fused.loss.cross_entropy_gradient_`, of logits that are adjusted on the way.

    Args:
        logits: (T, n, H, K).
        adjustment: of each class (T, 1 or H, K).
        labels: int64 (T, n).
        weights: (T, n), with the strides of the labels.
        gradient: (T, n, H, K), written.
        log_probabilities: (T, n, H), written.
    """
    trials, rows, heads, classes = logits.shape
    adjustment = adjustment.expand(-1, heads, -1)
    strides = (logits.stride(0), *adjustment.stride()[:2], gradient.stride(0), labels.stride(0))
    _call(
        "cross_entropy", logits, adjustment, labels, weights, gradient, log_probabilities,
        trials, rows, heads, classes, *strides, log_probabilities.stride(0),
    )  # fmt: skip


def logit_gradient_(
    gradient: Tensor, logits: Tensor, row_scale: Tensor, column_scale: Tensor, along: Tensor, along_rows: Tensor
) -> None:
    """The gradient dz times the factors of :func:`scale_logits_`, and the sums of dz z.

    Args:
        gradient: dz (T, n, M), contiguous; overwritten.
        logits: z (T, n, M).
        row_scale: (T, n, 1).
        column_scale: (T, 1, M).
        along: sums over rows (T, M), written.
        along_rows: sums over vectors (T, n, 1), written.
    """
    trials, rows, columns = gradient.shape
    strides = logits.stride(0), row_scale.stride(0)
    _call(
        "logit_gradient", gradient, logits, row_scale, column_scale, along, along_rows, trials, rows, columns, *strides
    )


def subtract_rows_(gradient: Tensor, rows: Tensor, along: Tensor, inverse: Tensor) -> None:
    """Subtract along / length^2 times its row from a gradient, in place.

    Args:
        gradient: (T, n, D), contiguous.
        rows: (T, n, D).
        along: (T, n, 1), contiguous.
        inverse: 1 / length (T, n, 1).
    """
    trials, count, dim = gradient.shape
    _call("subtract_rows", gradient, rows, along, inverse, trials, count, dim, rows.stride(0), inverse.stride(0))


def update_(parameters: Tensor, velocity: Tensor, factors: Tensor, decay: Tensor, dim: int, rates: Tensor) -> None:
    """Add c p to the velocity, then move all parameters by -rate times the velocity.

    Args:
        parameters: p (T, P), class vectors first.
        velocity: (T, P).
        factors: c of each class vector (T, M).
        decay: c of the other parameters (T, 1).
        dim: width D of a class vector.
        rates: (T,).
    """
    trials, size = parameters.shape
    vectors = factors.shape[1]
    _call("update", parameters, velocity, factors, decay, rates, trials, vectors, dim, size, parameters.stride(0))


def orthogonality_gradient_(gram: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """See :func:`ulfine_fast.ops.kernels.orthogonality_gradient_`."""
    trials, classes, _ = gram.shape
    squares = torch.empty_like(weight)
    factor = 4.0 / classes**2 * weight
    _call("orthogonality", gram, inverse, factor, squares, trials, classes, inverse.stride(0))
    return squares / classes**2


def pseudo_labels(
    linear: Tensor, similarity: Tensor, eta: Tensor, threshold: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ulfine_fast.ops.kernels.pseudo_labels`; both logits have the same strides."""
    trials, rows, classes = linear.shape
    labels = torch.empty(trials, rows, dtype=torch.int64)
    mask = linear.new_empty(trials, rows)
    mean, room = linear.new_empty(trials, classes), linear.new_empty(classes)
    strides = linear.stride()[:2]
    _call(
        "pseudo_labels", linear, similarity, eta, threshold, temperature, labels, mask, mean, room,
        trials, rows, classes, *strides,
    )  # fmt: skip
    return labels, mask, mean


def move_prototypes_(
    visual: Tensor,
    seen: Tensor,
    textual: Tensor,
    rows: Tensor,
    inverse: Tensor,
    labels: Tensor,
    momentum: Tensor,
    alpha: Tensor,
) -> None:
    """See :func:`ulfine_fast.ops.kernels.move_prototypes_`."""
    trials, classes, dim = visual.shape
    room = visual.new_empty(classes)
    strides = textual.stride(0), rows.stride(0), inverse.stride(0), labels.stride(0)
    _call(
        "move_prototypes", visual, seen, textual, rows, inverse, labels, momentum, alpha.contiguous(), room,
        trials, labels.shape[1], classes, dim, *strides,
    )  # fmt: skip
