"""Every kernel compiles for NVIDIA's data-center GPUs, as it is launched, and keeps what it works on in registers.

It wants Triton with its assembler, and no GPU.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.fake_gpu import needs_assembler

from rai_toolbox.kernels import _layouts, _operators, _points
from rai_toolbox.kernels._changes import Kind

pytestmark = needs_assembler

CPU = torch.device("cpu")
ODD, LONG = 127, 3 * 224 * 224  # how long a datum is; those of a multiple of 8 entries are read several at a time
# The types of pointers; every other one is to int64.
POINTERS = {
    **dict.fromkeys(("parts", "g_parts", "p_parts"), "*fp64"),
    **dict.fromkeys(("radii", "lows", "highs"), "*fp32"),
}
CHANGES = {"KIND": int(Kind.NORMALIZE), "P": 2, "SHIFT": True, "UPDATE": True, "SHRINK": True, "RADII": -1}


def launches() -> Iterator[tuple[str, _layouts.Launch, dict[str, Any]]]:
    """Kernels, with the blocks and warps that the layouts give them."""
    for length in (15, 128, 1023, 4096, 8192):
        (launch,) = _layouts.tiles(((4, length),), CPU)
        yield "step_rows", launch, {"ROWS": launch.rows, "COLUMNS": launch.columns, **CHANGES, "AFTER": int(Kind.BALL)}
    (launch,) = _layouts.parts(((4, LONG),), CPU)
    yield "sums_of_parts", launch, {"BLOCK": launch.columns, "P": 2}
    for kind, after in ((Kind.NORMALIZE, Kind.NOTHING), (Kind.SIGN, Kind.CLAMP)):
        constants = {**CHANGES, "KIND": int(kind), "AFTER": int(after), "MEASURE": after is Kind.NOTHING}
        yield "step_parts", launch, {"BLOCK": launch.columns, **constants}
    for length in (ODD, LONG):
        (launch,) = _layouts.data(((4, length),), (2,), 4, CPU)
        yield (
            "keep_largest",
            launch,
            {"BLOCK": launch.columns, "SIGNED": True, "RADII": -1, "COUNTS": False, "VERTEX": False},
        )
        (launch,) = _layouts.data(((4, length),), (0,), 2, CPU)
        yield "l1_or_simplex", launch, {"BLOCK": launch.columns, "SIMPLEX": False, "RADII": 1}
        for p in (1, 2):
            box = {"LOWS": True, "HIGHS": True, "P": p, "RADII": 1}
            yield "nearest_in_box", launch, {"BLOCK": launch.columns, **box}


POINTS = {
    "row_distances": {"P": 2},
    "land_rows": {"P": 2, "BOUNDED": True},
    "usable_gradients": {"DRAW": True},
    "put_rows": {},
    "random_rows": {"UNIFORM": False},
}


# Their pointers: to float32 data, as they are compiled here.
OF_POINTS = {
    "row_distances": {"points": "*fp32", "data": "*fp32", "result": "*fp64"},
    "land_rows": {"radii": "*fp64", **dict.fromkeys(("delta", "data", "lows", "highs", "result"), "*fp32")},
    "usable_gradients": {"grads": "*fp32", "result": "*fp32", "dead": "*i8"},
    "put_rows": {"into": "*i32", "mask": "*i8", "values": "*i32"},
    "random_rows": {"result": "*fp64"},
}


def point_launches() -> Iterator[tuple[str, _layouts.Launch, dict[str, Any]]]:
    """Those of a row each, which read no table."""
    for length in (ODD, 3072, LONG):
        _, warps, block = _points._per_row(torch.empty(4, length, device="meta"))
        launch = _layouts.Launch(torch.empty(0), 1, block, warps, False, ())
        for name, constants in POINTS.items():
            yield name, launch, {"BLOCK": block, **constants}


def compiled(name: str, launch: _layouts.Launch, dtype: torch.dtype, architecture: int, constants: dict) -> Any:
    """What Triton makes of a kernel."""
    compiler, backends = (importlib.import_module(f"triton.{m}.compiler") for m in ("compiler", "backends"))
    kernel = _operators._kernel(name)
    aligned = {} if name in POINTS else {"ALIGNED": launch.aligned}
    given = {"T": _operators._dtype(dtype), **aligned, **constants}
    signature, constexprs = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[i,] = given.pop(parameter.name)
        else:
            kinds = OF_POINTS[name] if name in POINTS else POINTERS
            signature[parameter.name] = parameter.annotation_type or kinds.get(parameter.name, "*i64")
    assert not given
    return importlib.import_module("triton").compile(
        compiler.ASTSource(kernel, signature, constexprs),
        target=backends.GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, **_operators.options(name)},
    )


def usage(cubin: bytes, folder: Path) -> tuple[int, int]:
    """How many registers a thread has, and how many bytes of memory for what they do not hold."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
    shown = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found is not None, shown
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_kernel_compiles_without_a_spilled_register(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    measured_in_bytes = ("step_rows", "sums_of_parts", "step_parts")
    most = 0
    for name, launch, constants in itertools.chain(launches(), point_launches()):
        # one dtype is enough for what is long in arithmetic and short in loads
        if name == "put_rows":
            compiled(name, launch, torch.int32, architecture, constants)
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if name in measured_in_bytes else (torch.float32,):
            made = compiled(name, launch, dtype, architecture, constants)
            registers, spilled = usage(made.asm["cubin"], tmp_path)
            assert spilled == 0, (name, launch.columns, launch.warps, dtype, registers, spilled)
            # a block of so many threads has 65,536 registers
            assert registers * 32 * launch.warps <= 65_536, (name, launch.columns, registers)
            most = max(most, registers)
    assert 32 < most <= 255  # something was read
