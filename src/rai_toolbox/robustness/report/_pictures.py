"""Pictures: curve.png, and the drawings of the report."""

from __future__ import annotations

import base64
import io
import itertools
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._evidence import AveragePoint
from rai_toolbox.robustness._results import Point, Results
from rai_toolbox.robustness._statistics import wilson_interval
from rai_toolbox.robustness._text import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with any color vision; also by the shape of their markers.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")

# How many radii a curve is drawn at, beside the reported ones.
_FINE = 241

# The curves of one evaluation, in the legend.
_WORST, _AVERAGE = "worst case (attack)", "average (random points)"


def plot_curves(evaluations: Mapping[str, Results]) -> Figure:
    """Return a figure with one panel per norm and one curve per evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    norms = list(dict.fromkeys(norm for one in evaluations.values() for norm in one.curves))
    figure = Figure(figsize=(0.6 + 5.4 * len(norms), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(norms), squeeze=False)[0]
    measure = next(iter(evaluations.values())).measure
    for panel, norm in zip(panels, norms, strict=True):
        for position, (name, evaluation) in enumerate(evaluations.items()):
            if norm not in evaluation.curves:
                continue
            points = evaluation.curves[norm].points
            color, marker = (one[position % len(one)] for one in (_COLORS, _MARKERS))
            epsilon, value, low, high = _drawn(evaluation, norm, points[-1].epsilon)
            panel.plot(epsilon, value, color=color)
            panel.fill_between(epsilon, low, high, color=color, alpha=0.15, linewidth=0)
            # The line of the legend, with the marker of the reported points.
            alone = _WORST if len(evaluations) == 1 and evaluation.curves[norm].average and not name else None
            panel.plot([], [], color=color, marker=marker, markersize=5, label=alone or _called(name))
            reported = [point.epsilon for point in points], [point.value for point in points]
            panel.plot(*reported, color=color, marker=marker, markersize=5, linestyle="none")
            if len(evaluations) == 1:
                _plot_average(panel, evaluation, norm)
        panel.set_xlabel(f"ε ({norm})")
        panel.set_ylabel(f"{measure} under attack")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0, top=1.02 if measure == "accuracy" else None)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[1]:
            for text in panel.legend(frameon=False).get_texts():
                text.set_parse_math(False)  # a name with two dollar signs is no formula
    return figure


def _plot_average(panel: Axes, evaluation: Results, norm: str) -> None:
    average = evaluation.curves[norm].average
    if not average:
        return
    epsilon, value, low, high = np.array([_as_measure(evaluation, point) for point in average]).T
    panel.plot(epsilon, value, color=_COLORS[1], marker=_MARKERS[1], markersize=4, linestyle="--", label=_AVERAGE)
    panel.fill_between(epsilon, low, high, color=_COLORS[1], alpha=0.15, linewidth=0)


def _as_measure(evaluation: Results, point: AveragePoint) -> tuple[float, float, float, float]:
    """Return the radius of an average, and its error and interval in the measure of the curve."""
    if evaluation.task == "classification":
        return point.epsilon, 1 - point.error, 1 - point.high, 1 - point.low
    return point.epsilon, point.error, point.low, point.high


def curve_png(evaluations: Mapping[str, Results]) -> bytes:
    """Return the picture of the curves as the content of a PNG file."""
    content = io.BytesIO()
    # It warns of letters that its font has not, of names too long for the panel, and of radii near the largest number.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        plot_curves(evaluations).savefig(content, format="png", dpi=160)
    return content.getvalue()


def _called(name: str) -> str | None:
    """Return a name for a legend: short, on one line, and not hidden by the underscore that it begins with."""
    name = " ".join(name.split())
    name = shortened(name)
    return f" {name}" if name.startswith("_") else name or None


def curve_drawing(evaluations: Mapping[str, Results], norm: str) -> dict[str, Any]:
    """Return the geometry of a curve's drawing, for the report's template: a box of some width and height with ticks,
    bands, lines and points.
    """
    shown = {name: one for name, one in evaluations.items() if norm in one.curves}
    curves = [one.curves[norm] for one in shown.values()]
    width, height, left, right, top, bottom = 720, 372, 72, 18, 18, 60
    widest = max(point.epsilon for curve in curves for point in curve.points) or 1.0
    accuracy = next(iter(shown.values())).task == "classification"
    tallest = 1.0 if accuracy else _ceiling([point.high for curve in curves for point in curve.points])

    def x_of(epsilon: float) -> float:
        return round(left + epsilon / widest * (width - left - right), 2)

    def y_of(value: float) -> float:
        return round(height - bottom - min(value, tallest) / tallest * (height - top - bottom), 2)

    lines = []
    for (name, one), curve in zip(shown.items(), curves, strict=True):
        epsilon, value, low, high = (values.tolist() for values in _drawn(one, norm, widest))
        x = [x_of(radius) for radius in epsilon]
        upper, lower = zip(x, map(y_of, high), strict=True), zip(x, map(y_of, low), strict=True)
        lines.append(
            {
                "name": name,
                "band": _coordinates([*upper, *reversed(list(lower))]),
                "line": _coordinates(list(zip(x, map(y_of, value), strict=True))),
                "points": [
                    {"x": x_of(point.epsilon), "y": y_of(point.value), "point": point} for point in curve.points
                ],
            }
        )
    if len(shown) == 1 and curves[0].average:
        lines[0]["name"] = lines[0]["name"] or "worst case"
        lines.append(_average_line(next(iter(shown.values())), norm, x_of, y_of))
    stops = sorted({point.epsilon for curve in curves for point in curve.points})
    places = [x_of(epsilon) for epsilon in stops]
    edges = [left, *((a + b) / 2 for a, b in itertools.pairwise(places)), width - right]
    return {
        "width": width, "height": height, "left": left, "right": width - right, "top": top, "bottom": height - bottom,
        "lines": lines,
        "x_ticks": [(x_of(tick), f"{tick:g}") for tick in _ticks(widest)],
        "y_ticks": [(y_of(tick), f"{tick:.0%}" if accuracy else f"{tick:g}") for tick in _ticks(tallest)],
        "columns": [
            {"epsilon": stop, "x": place, "from": edges[i], "width": round(edges[i + 1] - edges[i], 2)}
            for i, (stop, place) in enumerate(zip(stops, places, strict=True))
        ],
    }  # fmt: skip


def _average_line(
    evaluation: Results, norm: str, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> dict[str, Any]:
    """Return the geometry of the average beside a curve, as `curve_drawing` has it of the curve."""
    rows = [_as_measure(evaluation, point) for point in evaluation.curves[norm].average]
    upper = [(x_of(epsilon), y_of(high)) for epsilon, _, _, high in rows]
    lower = [(x_of(epsilon), y_of(low)) for epsilon, _, low, _ in rows]
    return {
        "name": "random points",
        "band": _coordinates([*upper, *reversed(lower)]),
        "line": _coordinates([(x_of(epsilon), y_of(value)) for epsilon, value, _, _ in rows]),
        "points": [
            {"x": x_of(row[0]), "y": y_of(row[1]), "point": Point(*row, samples=point.points)}
            for row, point in zip(rows, evaluation.curves[norm].average, strict=True)
        ],
    }


def corruption_drawing(evaluation: Results) -> list[dict[str, Any]]:
    """Return a small drawing for each corruption: its name and the points of its curve, in a box of 240 by 90."""
    accuracy = evaluation.task == "classification"
    drawings = []
    for name, corruption in evaluation.corruptions.items():
        points = corruption.points
        widest = points[-1].severity or 1.0
        tallest = 1.0 if accuracy else _ceiling([point.high for point in points])

        def at(severity: float, value: float, widest: float = widest, tallest: float = tallest) -> tuple[float, float]:
            return round(240 * severity / widest, 2), round(90 * (1 - min(value, tallest) / tallest), 2)

        upper = [at(point.severity, point.high) for point in points]
        lower = [at(point.severity, point.low) for point in points]
        drawings.append(
            {
                "name": name,
                "line": _coordinates([at(point.severity, point.value) for point in points]),
                "band": _coordinates([*upper, *reversed(lower)]),
                "points": points,
            }
        )
    return drawings


def _drawn(evaluation: Results, norm: str, widest: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return radii with the curve and both ends of its interval there.

    Accuracies are known at every radius, from the samples' distances: the interval is that of each radius, since
    between those of two reported points the curve could leave a straight band. Errors are known at the points only.
    """
    points = evaluation.curves[norm].points
    distance = evaluation.distance.get(norm, np.zeros(0))
    if len(distance) == 0 or np.isnan(distance).any():
        rows = [(point.epsilon, point.value, point.low, point.high) for point in points]
        epsilon, value, low, high = np.array(rows, dtype=np.float64).T
        return epsilon, value, low, high
    radii = np.union1d(np.linspace(0, widest, _FINE), [point.epsilon for point in points])
    standing = len(distance) - np.searchsorted(np.sort(distance), radii, side="right")
    low, high = np.array([wilson_interval(count, len(distance)) for count in standing.tolist()]).T
    return radii, standing / len(distance), low, high


def _ceiling(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=1.0) * 1.05 or 1.0


def _ticks(reach: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(reach / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if reach / (factor * power) <= 5.0001)
    return [step * k for k in range(int(reach / step + 1e-9) + 1)]


def _coordinates(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG of pixels (H, W) or (H, W, 3)."""
    height, width = pixels.shape[:2]
    color = 2 if pixels.ndim == 3 else 0
    rows = pixels.reshape(height, -1)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return a PNG as a URI that needs no file."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")


def image_of(sample: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Return the pixels of a sample (H, W), (C, H, W) or (H, W, C), its range [low, high] made [0, 255]."""
    channels = _channels_last(sample)
    scaled = np.clip((channels - low) / max(high - low, 1e-30), 0, 1)
    return np.round(255 * scaled).astype(np.uint8)


def perturbation_of(delta: NDArray) -> NDArray[np.uint8]:
    """Return the pixels of a perturbation, its largest entry made full strength: red is more, blue is less,
    white is unchanged.
    """
    channels = _channels_last(delta)
    scaled = channels / max(float(np.abs(channels).max()), 1e-30)
    if channels.ndim == 3:
        return np.round(127.5 + 127.5 * scaled).astype(np.uint8)
    more, less = np.clip(scaled, 0, 1)[..., None], np.clip(-scaled, 0, 1)[..., None]
    red, blue = np.array([178, 24, 43]), np.array([33, 102, 172])
    white = np.array([247, 247, 247])
    return np.round(white + more * (red - white) + less * (blue - white)).astype(np.uint8)


def _channels_last(sample: NDArray) -> NDArray:
    """Return a picture as (H, W) or (H, W, 3): the first three of its channels."""
    if sample.ndim == 2:
        return sample
    if len(sample) in (1, 3, 4):
        sample = np.moveaxis(sample, 0, -1)
    return sample[..., 0] if sample.shape[-1] == 1 else sample[..., :3]


def series_path(values: NDArray, low: float, high: float, width: float, height: float) -> str:
    """Return the points of a line through a series, for an SVG polyline."""
    x = np.linspace(0, width, len(values))
    y = height - (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-30) * height
    return _coordinates(list(zip(x.round(2).tolist(), y.round(2).tolist(), strict=True)))
