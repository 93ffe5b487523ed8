"""A run as an export folder: the model file, its config.json, and a model card."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.exports.card import model_card
from ulfine_fast.exports.config import (
    CARD,
    COVERAGE,
    FORMATS,
    OPSET,
    REJECT,
    calibration_of,
    export_config,
    outputs_of,
    usual_thresholds,
    write_config,
)
from ulfine_fast.exports.graphs import ImageScorer, Scorer
from ulfine_fast.runs.files import write_tensors
from ulfine_fast.runs.folder import flush_file

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.runs.run import Run


def export(run: Run, out: str | Path, *, to: str = "safetensors", encoder: Encoder | None = None) -> Path:
    """Writes a run as a folder that other programs read, and `ulfine_fast.load` too.

    Args:
        run: a fitted run.
        out: a new or empty folder.
        to: "safetensors" for the run's tensors and settings; "onnx", "torchscript" or "torch.export" for a graph from
            features to probabilities.
        encoder: the run's encoder (`ulfine_fast.runs.predict.encoder_of_run`), to put it into the graph too, which then
            takes images of the model's size.

    Returns:
        The folder.

    Raises:
        InputError: another format, an encoder for safetensors, a folder with something in it, a package that is
            missing, a method whose prediction has no graph.
    """
    if to not in FORMATS:
        raise one_of("the format", to, FORMATS)
    if encoder is not None and to == "safetensors":
        raise InputError("safetensors holds the run alone; choose onnx, torchscript or torch.export for the encoder")
    if run.second is not None:
        raise InputError(
            "a run of two encoders is not exported; predict with the run, or fit one encoder and export it"
        )
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose a new one")
    # of other formats, programs expect one output
    scorer = Scorer(run, with_scores=to == "onnx" and run.calibration is not None).eval()
    module = scorer if encoder is None else ImageScorer(encoder, scorer).eval()
    config = export_config(run, to, encoder)

    # written under another name beside it, so that the folder appears whole
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    except OSError as error:
        raise InputError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    try:
        file = temporary / FORMATS[to]
        if to == "safetensors":
            write_tensors(run, file)
        else:
            _write_graph(file, run, module, config)
        write_config(temporary, config)
        (temporary / CARD).write_text(model_card(run, config), encoding="utf-8", errors="backslashreplace")
        for path in temporary.iterdir():
            flush_file(path)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_graph(file: Path, run: Run, module: nn.Module, config: dict[str, Any]) -> None:
    # these methods search in blocks, whose number a trace would fix
    if "present" in run.tensors:
        raise InputError(
            f"method {run.config.method} looks through stored images, which no graph for batches of any size holds; "
            "export it to safetensors"
        )

    # three inputs: an exporter takes one or two for a number that never changes
    shape = [3, *config["input"]["shape"][1:]]
    generator = torch.Generator().manual_seed(0)
    if config["input"]["dtype"] == "uint8":
        example = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        example = torch.randn(shape, generator=generator)

    write = {"onnx": write_onnx, "torchscript": _write_torchscript, "torch.export": _write_exported}[config["to"]]
    try:
        # the exporters warn of their own internals
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(file, module, example, config)
    except InputError:
        raise
    # each exporter has errors of its own for an operation it does not know
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"method {run.config.method} cannot be exported to {config['to']} ({reason}); export to safetensors"
        ) from error


def refuse_without_onnx() -> None:
    """Refuse to write a graph where the packages for it are missing.

    Raises:
        InputError: names the extra to install.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError('export to onnx needs two more packages; pip install "ulfine-fast[export]"') from error


def write_onnx(file: Path, module: nn.Module, example: Tensor, config: dict[str, Any]) -> None:
    """Write a module as an ONNX graph for batches of any size.

    Args:
        file: to write.
        module: from `example` to the outputs that `outputs_of` names.
        example: inputs of a few rows.
        config: the export folder's config.json.

    Raises:
        InputError: the packages are missing, or the graph would be for one size of batch.
    """
    refuse_without_onnx()
    import onnx

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=[config["input"]["name"]],
        output_names=outputs_of(config),
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # an exporter that cannot follow a batch of any size fixes the size without an error
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError(f"method {config['method']} would take {len(example)} rows at a time; export to safetensors")
    properties = {"class_names": json.dumps(config["class_names"]), "made_by": config["created_by"]}
    usual = usual_thresholds(calibration_of(config), len(config["class_names"]))
    if usual is not None:
        # -inf as JSON has it, null
        score = usual.score if math.isfinite(usual.score) else None
        properties[f"reject_{REJECT:g}"] = json.dumps(score)
        properties[f"sets_{COVERAGE:g}"] = json.dumps(usual.probability)
    onnx.helper.set_model_props(model, properties)
    onnx.save_model(model, file)


def _write_torchscript(file: Path, module: nn.Module, example: Tensor, config: dict[str, Any]) -> None:
    traced = torch.jit.trace(module, example, check_trace=False)
    traced.save(str(file), _extra_files={"class_names.json": json.dumps(config["class_names"])})


def _write_exported(file: Path, module: nn.Module, example: Tensor, config: dict[str, Any]) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, file, extra_files={"class_names.json": json.dumps(config["class_names"])})
