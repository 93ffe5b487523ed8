"""Triton kernels built for GPUs on a machine without one: they compile, and their values stay in registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ulfine_fast.ops import kernels

triton = pytest.importorskip("triton", "3.3", reason="Triton is not installed here, or too old to build for others")

FLOATS = (
    *("logits", "weights", "log_probabilities", "out", "linear", "similarity", "eta", "threshold", "temperature"),
    *("mask", "parts", "mean", "velocity", "parameters", "momentum", "decay", "gram", "inverse", "factor", "squares"),
    *("visual", "textual", "alpha"),
)
TYPES = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(("labels", "slots", "seeds", "steps", "step", "below"), "*i64"),
    "store": "*fp16",
    "seen": "*i8",
}
CASES = [
    *(("_cross_entropy", {"BLOCK": k, "TINY": 1e-38}) for k in (100, 10_000)),
    *(("_pseudo", {"BLOCK": k}) for k in (10, 1000, 10_000)),
    ("_orthogonality", {"BLOCK": 1000}),
    ("_gather", {"BLOCK": 768}),
    ("_prototypes", {"BLOCK": 1280, "BATCH": 128, "EPS": 1e-12}),
    ("_mean_of_parts", {"BLOCK": 1024}),
    ("_decay", {"BLOCK": 1024}),
    ("_integers", {"BLOCK": 64}),
    ("_normals", {"BLOCK": 1024}),
]


@pytest.mark.parametrize(("name", "constants"), CASES, ids=lambda value: str(value))
def test_a_kernel_builds_for_hopper_without_spilling(name, constants, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not assembler.exists():
        pytest.skip("this Triton is without NVIDIA's assembler")
    kernel = getattr(kernels, name)
    block = triton.next_power_of_2(constants["BLOCK"])
    constants = {**constants, "BLOCK": block}
    values = block
    if name == "_pseudo":
        constants["ROWS"] = min(kernels._ROWS, max(1, kernels._TILE_VALUES // block))
        values *= constants["ROWS"]
    types = {**TYPES, "out": "*i64"} if name == "_integers" else TYPES
    types = {**types, "rows": "*fp32" if name == "_prototypes" else "i32"}
    signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": kernels._warps(values)})
    (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
    architecture = re.search(r"\.target (sm_90a?)", built.asm["ptx"])[1]
    command = [assembler, "-v", f"-arch={architecture}", "-o", tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 192
