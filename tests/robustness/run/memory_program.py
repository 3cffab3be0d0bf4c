"""How much memory an evaluation of many samples takes, in a process of its own: `python memory_program.py 100000`.

Prints by how many MiB the peak is above what it was before the evaluation. It writes its data, and a report, where
it is started.
"""

from __future__ import annotations

import resource
import sys
import zipfile

import numpy as np
import torch
from numpy.lib import format as npy
from torch import nn

from rai_toolbox.robustness import evaluate, load_data

SHAPE = (3, 32, 32)


def write(count: int) -> None:
    """Write data.npz in pieces, as data that does not fit in memory would be."""
    rng = np.random.default_rng(0)
    piece = rng.random((1000, *SHAPE), dtype=np.float32)
    with zipfile.ZipFile("data.npz", "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, *SHAPE)})
            for _ in range(count // len(piece)):
                file.write(piece.tobytes())
        with archive.open("y.npy", "w") as file:
            npy.write_array(file, rng.integers(0, 2, count))


def main(count: int) -> None:
    torch.set_num_threads(1)
    write(count)
    # A cheap model and one step: what is measured is what is kept of the samples, not the work on them.
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = evaluate(
        model, load_data("data.npz"), norms="linf", epsilons=[0.01], steps=1, restarts=1, batch_size=500,
        diagnostics=False, folder="out",
    )  # fmt: skip
    result.save("out")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))
