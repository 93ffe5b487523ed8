"""Triton kernels for steps that are bound by memory: each reads and writes its rows once.

Every kernel replaces a function in plain PyTorch, its specification, which calls it where :func:`usable` says so. With
TRITON_INTERPRET=1 in the environment they run on a processor, one program after another: slow, for tests.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from ulfine_fast.cache.io.device import current_device

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, or a PyTorch built without it
    triton = None

_EPS = 1e-12
# rows of a tile of pseudo-labels, and values that it may have
_ROWS = 8
_TILE_VALUES = 8192


def why_not(device: torch.device) -> str | None:
    """Why kernels are not used on a device, as a sentence; None where they are."""
    if triton is None:
        return "Triton is not installed here; the same steps run in plain PyTorch"
    if device.type != "cuda" and not _interpreted():
        return f"Triton needs a CUDA device, this one is {device.type}; the same steps run in plain PyTorch"
    return _why_not_built(device)


@functools.cache
def _why_not_built(device: torch.device) -> str | None:
    """Why no kernel can be built and run on a device; Triton needs a C compiler, Python's headers and a recent GPU."""
    try:
        with current_device(device):
            velocity, one = torch.ones(1, 1, device=device), torch.ones(1, device=device)
            decay_velocity_(velocity, velocity, one, one)
            velocity.cpu()
    # whatever compilers, linkers and drivers raise
    except Exception as error:
        reason = f"Triton cannot build kernels here ({_first_line(error)}); the same steps run in plain PyTorch"
        warnings.warn(reason, stacklevel=2)
        return reason
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def usable(tensor: Tensor) -> bool:
    """Whether kernels take a tensor: float32 on a CUDA device, or anywhere under Triton's interpreter."""
    return tensor.dtype == torch.float32 and runs_on(tensor.device)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device, see :func:`why_not`."""
    return why_not(device) is None


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _warps(values: int) -> int:
    """Warps of a program that holds so many values: one needs no barrier, and many keep large rows in registers."""
    return 1 if values <= 256 else 4 if values <= 2048 else 8 if values <= 8192 else 16


def gather_rows(store: Tensor, slots: Tensor, out: Tensor) -> None:
    """Rows of a store, widened and at unit length; see :meth:`ulfine_fast.core.features.DeviceFeatures.at`.

    Args:
        store: float16 or float32 (S, D).
        slots: int64 (T, n).
        out: float32 (T, n, D), written; its last axis is contiguous.
    """
    trials, rows, dim = out.shape
    slots = slots.contiguous()
    block = triton.next_power_of_2(dim)
    _gather[(trials * rows,)](
        store, slots, out, rows, dim, out.stride(0), out.stride(1), BLOCK=block, num_warps=_warps(block)
    )


def cross_entropy_gradient_(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """See :func:`ulfine_fast.core.fused.loss.cross_entropy_gradient_`; logits (T, n, H, K), contiguous but for T."""
    trials, rows, heads, classes = logits.shape
    log_probabilities = torch.empty(trials, rows, heads, dtype=logits.dtype, device=logits.device)
    labels, weights = labels.contiguous(), weights.contiguous()
    block = triton.next_power_of_2(classes)
    strides = logits.stride()[:3]
    tiny = torch.finfo(torch.float32).tiny
    _cross_entropy[(trials * rows * heads,)](
        logits,
        labels,
        weights,
        log_probabilities,
        rows,
        heads,
        classes,
        *strides,
        TINY=tiny,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return log_probabilities


def pseudo_labels(
    linear: Tensor, similarity: Tensor, eta: Tensor, threshold: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fusion of standardised logits, then hard pseudo-labels; no probability of a row is stored.

    See :func:`ulfine_fast.ops.fusion.fuse` (rule "standardize") and :func:`ulfine_fast.ops.losses.pseudo_labels`.

    Args:
        linear: (T, U, K), last axis contiguous.
        similarity: the same.
        eta: (T,).
        threshold: (T,).
        temperature: (T,).

    Returns:
        Labels int64 (T, U), mask (T, U), and the mean probability of each class (T, K).
    """
    trials, rows, classes = linear.shape
    labels = torch.empty(trials, rows, dtype=torch.int64, device=linear.device)
    mask = torch.empty(trials, rows, dtype=linear.dtype, device=linear.device)
    mean = torch.empty(trials, classes, dtype=linear.dtype, device=linear.device)
    per_trial = [tensor.contiguous() for tensor in (eta, threshold, temperature)]
    strides = (*linear.stride()[:2], *similarity.stride()[:2])
    block = triton.next_power_of_2(classes)
    # a program takes a tile of rows, as many as registers hold; its sum of probabilities is one part of the mean
    tile = min(_ROWS, max(1, _TILE_VALUES // block))
    tiles = triton.cdiv(rows, tile)
    parts = torch.empty(trials, tiles, classes, dtype=linear.dtype, device=linear.device)
    _pseudo[(trials, tiles)](
        linear, similarity, *per_trial, labels, mask, parts, rows, classes, *strides,
        ROWS=tile, BLOCK=block, num_warps=_warps(tile * block),
    )  # fmt: skip
    # added up in one order, whatever the number of trials
    columns = min(block, 1024)
    grid = (trials, triton.cdiv(classes, columns))
    _mean_of_parts[grid](parts, mean, rows, tiles, classes, BLOCK=columns, num_warps=_warps(columns))
    return labels, mask, mean


def decay_velocity_(velocity: Tensor, parameters: Tensor, momentum: Tensor, decay: Tensor) -> None:
    """Velocity <- m velocity + d parameters in one kernel; see :func:`ulfine_fast.ops.sgd.decay_velocity_`."""
    trials, size = velocity.shape
    grid = (trials, triton.cdiv(size, 1024))
    momentum, decay = momentum.contiguous(), decay.contiguous()
    _decay[grid](velocity, parameters, momentum, decay, size, velocity.stride(0), parameters.stride(0), BLOCK=1024)


def orthogonality_gradient_(gram: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Turn Gram matrices into the factor of the orthogonality's gradient; one pass over K x K.

    See :func:`ulfine_fast.core.fused.heads.add_orthogonality_gradient`.

    Args:
        gram: C C^T (T, K, K), contiguous; becomes G, so that G C is the gradient.
        inverse: 1 / length of the vectors (T, K).
        weight: (T,).

    Returns:
        || U U^T - I ||_F^2 / K^2 without its weight (T,).
    """
    trials, classes, _ = gram.shape
    squares = torch.empty(trials, classes, dtype=gram.dtype, device=gram.device)
    block = triton.next_power_of_2(classes)
    inverse, factor = inverse.contiguous(), 4.0 / classes**2 * weight
    _orthogonality[(trials, classes)](gram, inverse, factor, squares, classes, BLOCK=block, num_warps=_warps(block))
    return squares.sum(1) / classes**2


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
    """Class means, moving averages and fitting in one kernel over K x D; see :mod:`ulfine_fast.core.fused.prototypes`.

    Args:
        visual: (T, K, D), contiguous, moved.
        seen: bool (T, K), contiguous, moved.
        textual: (T, K, D), contiguous but for T, moved.
        rows: (T, B, D), last axis contiguous.
        inverse: (T, B).
        labels: int64 (T, B).
        momentum: (T,).
        alpha: (T, K).
    """
    trials, classes, dim = visual.shape
    marks = seen.view(torch.int8)
    inverse, labels, alpha = inverse.contiguous(), labels.contiguous(), alpha.contiguous()
    strides = textual.stride(0), rows.stride(0), rows.stride(1)
    block = triton.next_power_of_2(dim)
    _prototypes[(trials, classes)](
        visual, marks, textual, rows, inverse, labels, momentum.contiguous(), alpha,
        classes, dim, labels.shape[1], *strides,
        EPS=_EPS, BATCH=triton.next_power_of_2(labels.shape[1]), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def random_integers(seeds: Tensor, steps: Tensor, purpose: int, count: int, below: Tensor) -> Tensor:
    """See :func:`ulfine_fast.ops.philox.integers`: int64 (S, T, count) from seeds (T,), steps (S,), bounds (T,)."""
    out = torch.empty(len(steps), len(seeds), count, dtype=torch.int64, device=seeds.device)
    block = min(1024, triton.next_power_of_2(count))
    grid = (len(steps) * len(seeds), triton.cdiv(count, block))
    tensors = (seeds.contiguous(), steps.contiguous(), below.contiguous())
    _integers[grid](*tensors, out, purpose, len(seeds), count, BLOCK=block, num_warps=_warps(block))
    return out


def random_normals(seeds: Tensor, step: Tensor, purpose: int, count: int) -> Tensor:
    """See :func:`ulfine_fast.ops.philox.normals`: float32 (T, count) from seeds (T,) and one step (1,)."""
    out = torch.empty(len(seeds), count, dtype=torch.float32, device=seeds.device)
    grid = (len(seeds), triton.cdiv(count, 1024))
    _normals[grid](seeds.contiguous(), step, out, purpose, count, BLOCK=1024)
    return out


if triton is not None:

    @triton.jit
    def _words(seed, step, purpose, position):
        """Random words uint32 at positions of the stream of (seed, step, purpose): the block's four, one of them."""
        zero = position * 0
        a, b, c, d = tl.philox(seed, position // 4, zero + step, zero + purpose, zero)
        lane = position % 4
        return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))

    @triton.jit
    def _integers(seeds, steps, below, out, purpose, trials, count, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        trial = program % trials
        position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        step = tl.load(steps + program // trials).to(tl.int32)
        word = _words(tl.load(seeds + trial), step, purpose, position).to(tl.int64)
        # multiply-shift, exact in int64
        tl.store(
            out + program.to(tl.int64) * count + position,
            (word * tl.load(below + trial)) >> 32,
            mask=position < count,
        )

    @triton.jit
    def _normals(seeds, step, out, purpose, count, BLOCK: tl.constexpr):
        trial = tl.program_id(0)
        position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        seed, number = tl.load(seeds + trial), tl.load(step).to(tl.int32)
        # Box-Muller on float64 numbers strictly between 0 and 1, which are 2^-32 apart
        first = (_words(seed, number, purpose, position).to(tl.float64) + 0.5) * 2.3283064365386963e-10
        second = (_words(seed, number, purpose, position + count).to(tl.float64) + 0.5) * 2.3283064365386963e-10
        normal = tl.sqrt(-2.0 * tl.log(first)) * tl.cos(6.283185307179586 * second)
        tl.store(out + trial.to(tl.int64) * count + position, normal.to(tl.float32), mask=position < count)

    @triton.jit
    def _gather(store, slots, out, rows, dim, out_trial, out_row, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        slot = tl.load(slots + program)
        row = tl.load(store + slot * dim + columns, mask=columns < dim, other=0.0).to(tl.float32)
        row = row * tl.rsqrt(tl.sum(row * row, axis=0) + 1e-12)
        start = out + (program // rows).to(tl.int64) * out_trial + (program % rows) * out_row
        tl.store(start + columns, row, mask=columns < dim)

    @triton.jit
    def _cross_entropy(
        logits, labels, weights, log_probabilities, rows, heads, classes, at_trial, at_row, at_head,
        TINY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        row = program // heads
        columns = tl.arange(0, BLOCK)
        inside = columns < classes
        start = logits + (row // rows).to(tl.int64) * at_trial + (row % rows) * at_row + (program % heads) * at_head
        z = tl.load(start + columns, mask=inside, other=float("-inf"))
        z = tl.exp(z - tl.max(z, axis=0))
        probability = z / tl.sum(z, axis=0)
        label, weight = tl.load(labels + row), tl.load(weights + row)
        picked = tl.sum(tl.where(columns == label, probability, 0.0), axis=0)
        # a diverged trial's loss stays NaN, as in plain PyTorch
        picked = tl.maximum(picked, TINY, propagate_nan=tl.PropagateNan.ALL)
        tl.store(log_probabilities + program, tl.log(picked))
        gradient = weight * (probability - tl.where(columns == label, 1.0, 0.0))
        tl.store(start + columns, gradient, mask=inside)

    @triton.jit
    def _pseudo(
        linear, similarity, eta, threshold, temperature, labels, mask, parts, rows, classes,
        linear_trial, linear_row, similar_trial, similar_row, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        trial = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (columns < classes)[None, :]
        weight, least, divisor = tl.load(eta + trial), tl.load(threshold + trial), tl.load(temperature + trial)
        at = trial * linear_trial + row[:, None] * linear_row + columns[None, :]
        x = tl.load(linear + at, mask=inside, other=0.0)
        at = trial * similar_trial + row[:, None] * similar_row + columns[None, :]
        s = tl.load(similarity + at, mask=inside, other=0.0)
        level = tl.sum(s, axis=1)[:, None] / classes
        x = tl.where(inside, x - tl.sum(x, axis=1)[:, None] / classes, 0.0)
        spread = tl.sqrt(tl.sum(x * x, axis=1)) + 1e-6
        off = tl.where(inside, s - level, 0.0)
        wanted = tl.sqrt(tl.sum(off * off, axis=1)) + 1e-6
        fused = s + weight * (level + x * (wanted / spread)[:, None] - s)
        # padding has the probability 0; a row of padding alone must not be a quotient of zeros
        fused = tl.where((columns < classes)[None, :], fused / divisor, float("-inf"))
        fused = tl.exp(fused - tl.max(fused, axis=1)[:, None])
        probability = fused / tl.sum(fused, axis=1)[:, None]
        confidence = tl.max(probability, axis=1)
        # the first of equal classes, as torch has it
        label = tl.min(tl.where(probability == confidence[:, None], columns[None, :], BLOCK), axis=1)
        # a diverged trial's rows are equal to nothing; its label must not point beyond the classes
        label = tl.where(label < classes, label, 0)
        tl.store(labels + trial * rows + row, label.to(tl.int64), mask=row < rows)
        tl.store(mask + trial * rows + row, tl.where(confidence >= least, 1.0, 0.0), mask=row < rows)
        total = tl.sum(tl.where(inside, probability, 0.0), axis=0)
        start = parts + (trial * tl.num_programs(1) + tl.program_id(1)) * classes
        tl.store(start + columns, total, mask=columns < classes)

    @triton.jit
    def _mean_of_parts(parts, mean, rows, tiles, classes, BLOCK: tl.constexpr):
        trial = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < classes
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for tile in range(tiles):
            total += tl.load(parts + (trial * tiles + tile) * classes + columns, mask=inside, other=0.0)
        tl.store(mean + trial * classes + columns, total / rows, mask=inside)

    @triton.jit
    def _decay(velocity, parameters, momentum, decay, size, v_trial, p_trial, BLOCK: tl.constexpr):
        trial = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < size
        v = tl.load(velocity + trial * v_trial + columns, mask=inside)
        p = tl.load(parameters + trial * p_trial + columns, mask=inside)
        moved = tl.load(momentum + trial) * v + tl.load(decay + trial) * p
        tl.store(velocity + trial * v_trial + columns, moved, mask=inside)

    @triton.jit
    def _orthogonality(gram, inverse, factor, squares, classes, BLOCK: tl.constexpr):
        trial, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns = tl.arange(0, BLOCK)
        inside = columns < classes
        at = gram + (trial * classes + k) * classes + columns
        own = tl.load(inverse + trial * classes + k)
        scale = own * tl.load(inverse + trial * classes + columns, mask=inside, other=0.0)
        cosine = scale * tl.load(at, mask=inside, other=0.0)
        # the gradient by the cosines, without the part along the vector, which only changes its length
        off = tl.where(inside, cosine - tl.where(columns == k, 1.0, 0.0), 0.0)
        gradient = tl.load(factor + trial) * off
        along = tl.sum(cosine * gradient, axis=0)
        result = gradient * scale - tl.where(columns == k, along * own * own, 0.0)
        tl.store(at, result, mask=inside)
        tl.store(squares + trial * classes + k, tl.sum(off * off, axis=0))

    @triton.jit
    def _prototypes(
        visual, seen, textual, rows, inverse, labels, momentum, alpha, classes, dim, batch,
        text_trial, rows_trial, rows_row, EPS: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        trial, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
        columns, positions = tl.arange(0, BLOCK), tl.arange(0, BATCH)
        inside = columns < dim
        members = tl.load(labels + trial * batch + positions, mask=positions < batch, other=-1) == k
        count = tl.sum(members.to(tl.int32), axis=0)
        index = trial * classes + k
        met = tl.load(seen + index) != 0
        # most classes are not in the batch, and of those not met before nothing is read
        if met | (count > 0):
            v = tl.load(visual + index * dim + columns, mask=inside & met, other=0.0)
            if count > 0:
                total = tl.zeros((BLOCK,), dtype=tl.float32)
                for b in range(batch):
                    if tl.load(labels + trial * batch + b) == k:
                        row = tl.load(rows + trial * rows_trial + b * rows_row + columns, mask=inside, other=0.0)
                        total += row * tl.load(inverse + trial * batch + b)
                # a class that is met for the first time keeps nothing of its old vector
                keep = tl.where(met, tl.load(momentum + trial), 0.0)
                v = keep * v + (1.0 - keep) * total / count
                v = v * tl.rsqrt(tl.sum(v * v, axis=0) + EPS)
                tl.store(visual + index * dim + columns, v, mask=inside)
                tl.store(seen + index, 1)
            at = textual + trial * text_trial + k * dim + columns
            c = tl.load(at, mask=inside, other=0.0)
            pace = tl.load(alpha + index)
            unit = c * tl.rsqrt(tl.sum(c * c, axis=0) + EPS)
            fitted = (1.0 - pace) * unit + pace * v
            tl.store(at, fitted * tl.rsqrt(tl.sum(fitted * fitted, axis=0) + EPS), mask=inside)
