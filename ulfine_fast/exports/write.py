"""A run folder to an export folder: one file with the model, one that says what it is, a card for people."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.exports.card import model_card
from ulfine_fast.exports.graphs import ImageScorer, Scorer

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.runs.run import Run

FORMAT = "ulfine-fast-model"
# What each is written as.
FORMATS = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "torchscript": "model.ts",
    "torch.export": "model.pt2",
}
CONFIG = "config.json"
OPSET = 18


def export(run: Run, out: str | Path, *, to: str = "safetensors", encoder: Encoder | None = None) -> Path:
    """Writes a run as a folder that other programs read, and `ulfine_fast.load` too.

    Args:
        run: a fitted run.
        out: a new or empty folder.
        to: "safetensors" for the heads' tensors and settings; "onnx", "torchscript" or "torch.export" for a graph of
            everything from features to probabilities.
        encoder: the run's encoder (`ulfine_fast.runs.predict.encoder_of_run`), to put it into the graph too, which then
            takes images of the model's size.

    Returns:
        The folder.

    Raises:
        InputError: another format, an encoder for safetensors, a folder with something in it, a package that is
            missing, a method whose prediction has no graph.
    """
    if to not in FORMATS:
        raise InputError(f"the format must be one of {', '.join(FORMATS)}, got {to!r}")
    if encoder is not None and to == "safetensors":
        raise InputError("safetensors holds the heads alone; choose onnx, torchscript or torch.export for the encoder")
    folder = Path(out)
    _refuse_full(folder)
    scorer = Scorer(run).eval()
    module: nn.Module = scorer if encoder is None else ImageScorer(encoder, scorer).eval()
    told = _config(run, to, encoder)
    # beside it, so that the folder appears whole
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    beginning = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        _write_model(beginning / FORMATS[to], run, module, told)
        told["sha256"] = hashlib.sha256((beginning / FORMATS[to]).read_bytes()).hexdigest()
        (beginning / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (beginning / "README.md").write_text(model_card(run, told), encoding="utf-8")
        beginning.chmod(0o755)
        os.replace(beginning, folder)
    except BaseException:
        shutil.rmtree(beginning, ignore_errors=True)
        raise
    return folder


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose a new one")


def _config(run: Run, to: str, encoder: Encoder | None) -> dict[str, Any]:
    """What a reader must know, in JSON's types."""
    side = None if run.encoder is None else run.encoder["image_size"]
    shape = ["n", side, side, 3] if encoder is not None else ["n", *run.row_shape]
    kind = "uint8" if encoder is not None else "float32"
    return {
        "format": FORMAT,
        "version": 1,
        "to": to,
        "file": FORMATS[to],
        "input": {"name": "pictures" if encoder is not None else "features", "shape": shape, "dtype": kind},
        "output": {"name": "probabilities", "shape": ["n", len(run.class_names)], "dtype": "float32"},
        "class_names": run.class_names,
        "method": run.config.method,
        "temperature": float(run.metrics.get("temperature", 1.0)),
        "encoder": run.encoder,
        "config": run.config.to_dict(),
        "created_by": f"ulfine-fast {__version__}",
        **({"opset": OPSET} if to == "onnx" else {}),
        **({} if encoder is None else {"pictures": _preparing(encoder)}),
    }


def _preparing(encoder: Encoder) -> dict[str, Any]:
    """How image files become images of the model's size, for a reader without the model."""
    import open_clip

    reduced = None if encoder.exact or encoder.resampling is None else asdict(encoder.resampling)
    return {"open_clip": open_clip.get_model_preprocess_cfg(encoder.model), "resampling": reduced}


def _write_model(path: Path, run: Run, module: nn.Module, told: dict[str, Any]) -> None:
    if told["to"] == "safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in run.tensors.items()}, path)
        return
    # their search goes in blocks whose number a trace would fix
    if "present" in run.tensors:
        raise InputError(
            f"method {run.config.method} looks through stored images, which no graph for batches of any size holds; "
            "export it to safetensors"
        )
    example = _example(told["input"])
    write = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch.export": _write_exported}[told["to"]]
    try:
        # the exporters warn of what they do inside
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(path, module, example, told)
    except InputError:
        raise
    # each of them has errors of its own for an operation it does not know
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"method {run.config.method} cannot be exported to {told['to']} ({reason}); export to safetensors"
        ) from error


def _example(told: dict[str, Any]) -> Tensor:
    """Three inputs: one or two would be taken for a number that never changes."""
    shape = [3, *told["shape"][1:]]
    generator = torch.Generator().manual_seed(0)
    if told["dtype"] == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def _write_onnx(path: Path, module: nn.Module, example: Tensor, told: dict[str, Any]) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError('export to onnx needs two more packages; pip install "ulfine-fast[export]"') from error
    name = told["input"]["name"]
    made = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=[name],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=OPSET,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    # an exporter that cannot follow a batch of any size fixes it without a word
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError(f"method {told['method']} would take {len(example)} rows at a time; export to safetensors")
    onnx.helper.set_model_props(model, {"class_names": json.dumps(told["class_names"]), "made_by": told["created_by"]})
    onnx.save_model(model, path)


def _write_torchscript(path: Path, module: nn.Module, example: Tensor, told: dict[str, Any]) -> None:
    traced = torch.jit.trace(module, example, check_trace=False)
    traced.save(str(path), _extra_files={"class_names.json": json.dumps(told["class_names"])})


def _write_exported(path: Path, module: nn.Module, example: Tensor, told: dict[str, Any]) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, path, extra_files={"class_names.json": json.dumps(told["class_names"])})
