"""Triton's kernels as operators of torch: FakeTensorMode, torch.compile and profilers see one call each.

They take lists of contiguous tensors of one dtype on one device, and how long a datum of each is. An operator that does
not compile gives way to operators of torch, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.kernels import _layouts, _machine, _portable
from rai_toolbox.kernels._changes import NOTHING, Change, Kind, slack_of

# Which module has which kernel. They import Triton, so that the first launch imports them.
_MODULES = {
    **dict.fromkeys(("step_rows", "sums_of_parts", "step_parts"), "_device_scaling"),
    **dict.fromkeys(("keep_largest", "l1_or_simplex"), "_device_rows"),
    "nearest_in_box": "_device_box",
    **dict.fromkeys(("row_distances", "land_rows", "usable_gradients", "put_rows", "random_rows"), "_device_points"),
}
# Left to itself, the assembler of NVIDIA gives `l1_or_simplex` so few registers that some are spilled.
_REGISTERS = {"l1_or_simplex": {"maxnreg": 128}} if torch.version.cuda else {}

_library = torch.library.Library("rai_toolbox", "DEF")
_CHANGE = "int kind, int order, float[] numbers"
_BOTH = "Tensor(a!)[] gs, Tensor(b!)[] ps, int[] lengths"


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function that works on any device."""
    name = schema.split("(")[0]

    def define(function: Callable[..., Any]) -> Any:
        _library.define(
            schema, tags=(torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()
        )
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rai_toolbox::{name}", fake, lib=_library)
        return getattr(torch.ops.rai_toolbox, name).default

    return define


def _nothing(*args: Any) -> None:
    return None


def _shapes(xs: Sequence[Tensor], lengths: Sequence[int]) -> _layouts.Shapes:
    return tuple((x.numel() // length, length) for x, length in zip(xs, lengths, strict=True))


@functools.cache
def _kernel(name: str) -> Any:
    return getattr(importlib.import_module(f"{__package__}.{_MODULES[name]}"), name)


@functools.cache
def _dtype(dtype: torch.dtype) -> Any:
    """What Triton calls a dtype."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def options(kernel: str) -> dict[str, Any]:
    """What the compiler of a kernel is told.

    Products and sums are fused with every version: from Triton 3.10 on they are not, if nobody says so, and 3.9 warns.
    """
    return {"enable_fp_fusion": True, **_REGISTERS.get(kernel, {})}


def _run(
    kernel: str, launch: _layouts.Launch, device: torch.device, *args: Any, T: torch.dtype, **constants: Any
) -> bool:
    """Launch a kernel that reads a table, for data of dtype `T`, or return False where it cannot be."""
    return run(
        kernel, launch.programs, launch.warps, device, launch.table, launch.programs, *args, T=T, **constants
    )  # fmt: skip


def run(
    kernel: str, programs: int, warps: int, device: torch.device, *args: Any, T: torch.dtype, **constants: Any
) -> bool:
    """Launch a kernel for data of dtype `T`, or return False where it cannot be."""
    if device.type in _machine._unusable:
        return False
    try:
        here = contextlib.nullcontext()
        if device.type != "cpu":
            here = torch.get_device_module(device).device(device)
        with here:
            _kernel(kernel)[(programs,)](*args, T=_dtype(T), num_warps=warps, **constants, **options(kernel))
    except Exception as error:  # whatever compilers and drivers raise: torch's operators show what is wrong with data
        _machine.give_up(device, error)
        return False
    return True


def _radii(radii: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """Radii as the kernels take them, and their stride; -1 where there are none."""
    if radii is None:
        return like, -1
    radii = radii.reshape(-1).contiguous()
    return radii, int(radii.numel() > 1)


@operator(
    f"step_rows_({_BOTH}, {_CHANGE}, float keep, float lr, int after, float[] after_numbers, Tensor? radii) -> ()",
    _nothing,
)
def step_rows_(
    gs: list[Tensor],
    ps: list[Tensor],
    lengths: list[int],
    kind: int,
    order: int,
    numbers: list[float],
    keep: float,
    lr: float,
    after: int,
    after_numbers: list[float],
    radii: Tensor | None,
) -> None:
    """Change short data; then p ← keep·p - lr·g for each of `ps`, if there are any, and change these by `after`."""
    device = gs[0].device
    g_addresses, aligned = _layouts.addresses(gs, device)
    p_addresses, p_aligned = _layouts.addresses(ps, device) if ps else (g_addresses, True)
    bound, factor_scale, low, high, scale, bias = numbers
    radius, _, p_low, p_high, _, _ = after_numbers
    column, stride = _radii(radii, g_addresses)
    slacks = slack_of(gs[0].dtype)
    for launch in _layouts.tiles(_shapes(gs, lengths), device):
        done = _run(
            "step_rows", launch, device, g_addresses, p_addresses, keep, lr,
            bound, factor_scale, low, high, scale, bias,
            radius, column, p_low, p_high, *slacks,
            T=gs[0].dtype, ROWS=launch.rows, COLUMNS=launch.columns,
            ALIGNED=launch.aligned and aligned and p_aligned, KIND=kind, P=order, SHIFT=scale != 1 or bias != 0,
            UPDATE=bool(ps), SHRINK=keep != 1, AFTER=after, RADII=stride,
        )  # fmt: skip
        if not done:
            change, then = Change.of(kind, order, numbers), Change.of(after, 2, after_numbers)
            for i in launch.tensors:
                own = _own(radii, gs, lengths, i)
                _portable.step_(gs[i], ps[i] if ps else None, lengths[i], change, keep, lr, then, own)


def _own(radii: Tensor | None, xs: Sequence[Tensor], lengths: Sequence[int], i: int) -> Tensor | None:
    """The radii of the data of one tensor."""
    if radii is None or radii.numel() == 1:
        return radii
    counts = [n for n, _ in _shapes(xs, lengths)]
    return radii.reshape(-1).split(counts)[i]


def _fake_parts(xs: list[Tensor], lengths: list[int], order: int) -> Tensor:
    return xs[0].new_empty((2, _layouts.count_parts(_shapes(xs, lengths))), dtype=torch.float64)


@operator("norm_parts(Tensor[] xs, int[] lengths, int order) -> Tensor", _fake_parts)
def norm_parts(xs: list[Tensor], lengths: list[int], order: int) -> Tensor:
    """For the parts of long data: what is added up for their norms, and how many entries are infinite."""
    shapes, device = _shapes(xs, lengths), xs[0].device
    result = _fake_parts(xs, lengths, order)
    places, aligned = _layouts.addresses(xs, device)
    (launch,) = _layouts.parts(shapes, device)
    done = _run(
        "sums_of_parts", launch, device, places, result, result.shape[1],
        T=xs[0].dtype, BLOCK=launch.columns, ALIGNED=launch.aligned and aligned, P=order,
    )  # fmt: skip
    return result if done else result.zero_()  # what comes next does without it


@operator(
    f"step_parts_({_BOTH}, {_CHANGE}, Tensor? parts, float keep, float lr, int after, float[] after_numbers, "
    "Tensor(c!)? p_parts, Tensor? radii) -> ()",
    _nothing,
)
def step_parts_(
    gs: list[Tensor],
    ps: list[Tensor],
    lengths: list[int],
    kind: int,
    order: int,
    numbers: list[float],
    parts: Tensor | None,
    keep: float,
    lr: float,
    after: int,
    after_numbers: list[float],
    p_parts: Tensor | None,
    radii: Tensor | None,
) -> None:
    """As `step_rows_`, for long data, whose norms are known; those of `ps` are measured."""
    device = gs[0].device
    g_addresses, aligned = _layouts.addresses(gs, device)
    p_addresses, p_aligned = _layouts.addresses(ps, device) if ps else (g_addresses, True)
    bound, factor_scale, low, high, scale, bias = numbers
    _, _, p_low, p_high, _, _ = after_numbers
    column, stride = _radii(radii, g_addresses)
    (launch,) = _layouts.parts(_shapes(gs, lengths), device)
    done = _run(
        "step_parts", launch, device, g_addresses, p_addresses,
        g_addresses if parts is None else parts, g_addresses if p_parts is None else p_parts, launch.programs, keep, lr,
        bound, factor_scale, low, high, scale, bias, column, p_low, p_high, *slack_of(gs[0].dtype),
        T=gs[0].dtype, BLOCK=launch.columns, ALIGNED=launch.aligned and aligned and p_aligned, KIND=kind, P=order,
        SHIFT=scale != 1 or bias != 0, UPDATE=bool(ps), SHRINK=keep != 1, AFTER=after,
        MEASURE=p_parts is not None, RADII=stride,
    )  # fmt: skip
    if not done:
        change, then = Change.of(kind, order, numbers), Change.of(after, 2, after_numbers)
        for i, g in enumerate(gs):
            _portable.step_(g, ps[i] if ps else None, lengths[i], change, keep, lr, then, _own(radii, gs, lengths, i))


@operator(
    "keep_largest_(Tensor(a!)[] xs, int[] lengths, int[] counts, bool signed, bool vertex, float scale, Tensor? radii, "
    "Tensor? own_counts) -> ()",
    _nothing,
)
def keep_largest_(
    xs: list[Tensor],
    lengths: list[int],
    counts: list[int],
    signed: bool,
    vertex: bool,
    scale: float,
    radii: Tensor | None,
    own_counts: Tensor | None,
) -> None:
    """Zero all but the `counts` entries of largest magnitude of each datum, or make these signs.

    `own_counts`, int64: one of at least 1 for each datum, in place of those. `vertex`: one is kept, and becomes ±1 by
    its sign, 1 for zero, times the scale.
    """
    device = xs[0].device
    places, aligned = _layouts.addresses(xs, device)
    column, stride = _radii(radii, places)
    for launch in _layouts.data(_shapes(xs, lengths), tuple(counts), 4, device):
        done = _run(
            "keep_largest", launch, device, places, scale, column, places if own_counts is None else own_counts,
            T=xs[0].dtype, BLOCK=launch.columns, ALIGNED=launch.aligned and aligned, SIGNED=signed, RADII=stride,
            COUNTS=own_counts is not None, VERTEX=vertex,
        )  # fmt: skip
        if not done:
            for i in launch.tensors:
                own = _own(radii, xs, lengths, i)
                if vertex:
                    _portable.put_l1_vertices_(xs[i], lengths[i], scale, own)
                    continue
                each = _own(own_counts, xs, lengths, i)
                _portable.keep_largest_(xs[i], lengths[i], counts[i] if each is None else each, signed, scale, own)


@operator(
    "project_on_l1_or_simplex_(Tensor(a!)[] xs, int[] lengths, float total, Tensor? radii, bool simplex) -> ()",
    _nothing,
)
def project_on_l1_or_simplex_(
    xs: list[Tensor], lengths: list[int], total: float, radii: Tensor | None, simplex: bool
) -> None:
    """Replace data by the nearest points of the L1 ball, or of the simplex."""
    device = xs[0].device
    places, aligned = _layouts.addresses(xs, device)
    column, stride = _radii(radii, places)
    for launch in _layouts.data(_shapes(xs, lengths), (0,) * len(xs), 2, device):
        done = _run(
            "l1_or_simplex", launch, device, places, total, column, *slack_of(xs[0].dtype),
            T=xs[0].dtype, BLOCK=launch.columns, ALIGNED=launch.aligned and aligned, SIMPLEX=simplex, RADII=stride,
        )  # fmt: skip
        if not done:
            for i in launch.tensors:
                _portable.project_on_l1_or_simplex_(xs[i], lengths[i], total, _own(radii, xs, lengths, i), simplex)


@operator(
    "project_in_box_(Tensor(a!) x, int length, float radius, Tensor? radii, Tensor? low, float low_number, "
    "Tensor? high, float high_number, int order) -> ()",
    _nothing,
)
def project_in_box_(
    x: Tensor,
    length: int,
    radius: float,
    radii: Tensor | None,
    low: Tensor | None,
    low_number: float,
    high: Tensor | None,
    high_number: float,
    order: int,
) -> None:
    """Replace data by the nearest points of a ball and a box; bounds that are tensors have shape (n, length)."""
    device = x.device
    places, aligned = _layouts.addresses([x], device)
    column, stride = _radii(radii, places)
    strides = [(0, 0) if b is None else b.stride() for b in (low, high)]
    (launch,) = _layouts.data(_shapes([x], [length]), (0,), 2, device)
    done = _run(
        "nearest_in_box", launch, device, places, radius, column, *slack_of(x.dtype),
        places if low is None else low, low_number, *strides[0],
        places if high is None else high, high_number, *strides[1],
        T=x.dtype, BLOCK=launch.columns, ALIGNED=launch.aligned and aligned, P=order, RADII=stride,
        LOWS=low is not None, HIGHS=high is not None,
    )  # fmt: skip
    if not done:
        _portable.project_in_box_(
            x, length, radius if radii is None else radii,
            low_number if low is None else low, high_number if high is None else high, order,
        )  # fmt: skip


def by_norm_or_entry_(
    gs: Sequence[Tensor],
    ps: Sequence[Tensor],
    lengths: Sequence[int],
    change: Change,
    lr: float = 0.0,
    after: Change = NOTHING,
    radii: Tensor | None = None,
    keep: float = 1.0,
) -> None:
    """Change the data of `gs`; then p ← keep·p - lr·g for each of `ps`, if there are any, and change these by `after`.

    gs, ps: for which `all_have_kernels`; ps[i] has the shape of gs[i], or `ps` is empty.
    lengths: how many entries a datum of each has, ≥ 1.
    change, after: `after` is one without a scale and a bias: nothing, CLAMP, or BALL of order 2.
    keep: 0 makes a parameter zero, whatever it was.
    radii: in place of the bound of the last BALL: one for each datum of all, or one.
    """
    numbers, after_numbers = change.numbers(), after.numbers()
    entrywise = not (change.by_norm or after.by_norm)
    if entrywise:  # where data begin does not matter, so long and short go together
        lengths = [g.numel() for g in gs]
        small: list[int] = []
        large = list(range(len(gs)))
    else:
        small = [i for i, length in enumerate(lengths) if _layouts.is_tiled(length)]
        large = [i for i, length in enumerate(lengths) if not _layouts.is_tiled(length)]

    def some(which: list[int]) -> tuple[list[Tensor], list[Tensor], list[int], Tensor | None]:
        own = radii
        if radii is not None and radii.numel() > 1 and len(which) < len(gs):
            column = radii.reshape(-1).split([n for n, _ in _shapes(gs, lengths)])
            own = torch.cat([column[i] for i in which])
        return [gs[i] for i in which], [ps[i] for i in which] if ps else [], [lengths[i] for i in which], own

    if small:
        g, p, own_lengths, own = some(small)
        step_rows_(
            g, p, own_lengths, int(change.kind), change.order, numbers, keep, lr, int(after.kind), after_numbers, own
        )
        mark_as_changed(g, p)
    if large:
        g, p, own_lengths, own = some(large)
        kind, after_kind = int(change.kind), int(after.kind)
        parts = norm_parts(g, own_lengths, change.order) if change.by_norm else None
        last = after.kind is Kind.BALL
        g_radii = None if last else own
        n_parts = _layouts.count_parts(_shapes(g, own_lengths))
        p_parts = torch.empty((2, n_parts), dtype=torch.float64, device=g[0].device) if last else None
        then = int(Kind.NOTHING) if last else after_kind
        step_parts_(
            g, p, own_lengths, kind, change.order, numbers, parts, keep, lr, then, after_numbers, p_parts, g_radii
        )
        if last:
            step_parts_(
                p, [], own_lengths, after_kind, 2, after_numbers, p_parts, 1.0, 0.0, 0, after_numbers, None, own
            )
        mark_as_changed(g, p)


def mark_as_changed(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors have changed, as torch's own operators do."""
    for xs in lists:
        ordinary = [x for x in xs if not x.is_inference()]
        if ordinary and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(ordinary)
