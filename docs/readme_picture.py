"""Draw the picture of the README from the folder that `make demo` writes: the curve, and three digits as changed.

python docs/readme_picture.py demo-report docs/_static/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rai_toolbox.robustness import Evaluation


def draw(folder: Path, picture: Path) -> None:
    result = Evaluation.load(folder)
    norm, curve = next(iter(result.curves.items()))
    shown = np.load(folder / "examples.npz")
    index = list(result.index)
    # Three digits of different classes, at distances that the curve has in its middle.
    chosen: list[int] = []
    for i in np.argsort(np.abs(shown[f"{norm}_distance"] - curve.median_distance)):
        label = result.label[index.index(shown[f"{norm}_index"][i])]
        if all(label != result.label[index.index(shown[f"{norm}_index"][j])] for j in chosen):
            chosen.append(int(i))
        if len(chosen) == 3:
            break

    figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=110)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    axis = left.subplots()
    epsilon = [point.epsilon for point in curve.points]
    axis.fill_between(epsilon, [p.low for p in curve.points], [p.high for p in curve.points], alpha=0.2, lw=0)
    axis.plot(epsilon, [p.value for p in curve.points], "o-")
    axis.set(xlabel=f"ε ({norm})", ylabel="accuracy under attack", ylim=(0, 1.02))
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)

    columns = right.subplots(3, 3)
    for row, i in zip(columns, chosen, strict=True):
        before, after = shown[f"{norm}_original"][i, 0], shown[f"{norm}_perturbed"][i, 0]
        was = result.class_names[result.label[index.index(shown[f"{norm}_index"][i])]]
        now = result.class_names[int(shown[f"{norm}_prediction"][i])]
        row[0].imshow(before, cmap="gray_r", vmin=0, vmax=1)
        row[1].imshow(after - before, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        row[2].imshow(after, cmap="gray_r", vmin=0, vmax=1)
        row[0].set_ylabel(f"{was} → {now}", rotation=0, ha="right", va="center")
        for cell in row:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
    for cell, title in zip(columns[0], ("scan", "change", "perturbed"), strict=True):
        cell.set_title(title, fontsize=10)
    figure.savefig(picture, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
