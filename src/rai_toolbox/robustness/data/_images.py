"""A folder of images, one folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rai_toolbox._extras import install_command
from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness.data._pixels import PixelReader
from rai_toolbox.robustness.data._rows import Spool
from rai_toolbox.robustness.data._samples import Samples

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def load_images(path: Path) -> Samples:
    """Return the images under ``path/class/``, channels first, in [0, 1].

    Classes are numbered in the order of their names; where all names are numbers, these are the labels.
    """
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbers = _as_numbers(classes)
    files = [
        (file, label)
        for label, name in zip(numbers or range(len(classes)), classes, strict=True)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in _IMAGES and file.is_file()
    ]
    if not files:
        raise InputError(f"{arg('data')} {str(path)!r}: it has no folders with images; expected one folder per class")
    spool = Spool(lambda message: InputError(f"{arg('data')} {str(path)!r}: {message}; resize the images to one size"))
    for image in _read_images(files):
        spool.append(image[None])
    rows = spool.rows()
    labels = np.array([label for _, label in files])
    scale = 1 / np.iinfo(rows.dtype).max
    if numbers:
        return Samples(rows, labels, scale=scale, folder_numbers=tuple(sorted(numbers)))
    return Samples(rows, labels, scale=scale, class_names=tuple(classes))


def _as_numbers(names: list[str]) -> list[int]:
    """Return the numbers that the names are; none if one is no number, or two are the same one."""
    if not all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        return []
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else []


def _read_images(files: list[tuple[Path, int]]) -> Iterator[NDArray]:
    """Yield the pixels of each image."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"reading images needs Pillow: {install_command('cli')}") from None
    reader = PixelReader()
    for file, _ in files:
        try:
            with Image.open(file) as image:
                pixels = reader.read(image)
        except Exception as error:
            raise InputError(f"the image {str(file)!r} cannot be read: {' '.join(str(error).split())[:200]}") from None
        yield pixels
