"""From what `--data` names to samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._errors import InputError
from ._npz import NpzArchive
from ._rows import Spool
from ._samples import Samples, as_samples
from ._specs import call_named, names_function
from ._tables import load_table

__all__ = ["load_data"]

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".joblib"}
_FORMS = (
    "give an .npz, .csv or .parquet file, a folder with one folder of images per class, file.py:function, or digits"
)


def load_data(spec: str, *, label_column: str | None = None, seed: int = 0) -> Samples:
    """Return the samples that `spec` names.

    Parameters
    ----------
    spec : str
        ``"digits"``; an .npz file with arrays ``x`` and ``y``; a .csv or .parquet table; a folder that has a
        folder of images per class; ``file.py:function`` or ``package.module:function`` that returns a
        Dataset, a DataLoader or arrays ``(x, y)``.
    label_column : str, optional
        The column of a table that holds the label; ``label``, ``target`` or ``y`` is found without.
    seed : int
        Which split of the built-in data.

    Raises
    ------
    InputError
        If there is no such data or it cannot be used, in one line.
    """
    if spec == "digits":
        from ._digits import digits_samples

        return digits_samples(seed)
    if names_function(spec):
        return as_samples(call_named(spec, "--data"), what=f"--data {spec}")
    path = Path(spec)
    kind = path.suffix.lower()
    if label_column is not None and kind not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"--label-column names a column of a table, but --data {spec!r} is none")
    if "\0" in spec or not path.exists():
        raise InputError(f"--data: there is no file or folder {spec!r}; {_FORMS}")
    if path.is_dir():
        return _image_folder(path)
    if kind in _PICKLES:
        raise InputError(
            f"--data {spec!r} is a pickle, which could run code when read; save the arrays with"
            " numpy.savez('data.npz', x=x, y=y)"
        )
    if kind in (".csv", ".tsv", ".parquet"):
        return load_table(path, label_column)
    if kind == ".npz":
        return _npz_samples(path)
    raise InputError(f"--data {spec!r} is of no known kind; {_FORMS}")


def _npz_samples(path: Path) -> Samples:
    archive = NpzArchive(path)
    missing = [name for name in ("x", "y") if name not in archive]
    if missing:
        raise InputError(
            f"{str(path)!r} has no array {' and no array '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, archive.names)) or 'none'}; write it with numpy.savez(file, x=x, y=y)"
        )
    class_names, feature_names = (
        tuple(map(str, archive.array(key).reshape(-1))) if key in archive else None
        for key in ("class_names", "feature_names")
    )
    return Samples(archive.rows("x"), archive.array("y"), class_names=class_names, feature_names=feature_names)


def _image_folder(path: Path) -> Samples:
    """Return the images under ``path/class/``, channels first, in [0, 1]."""
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in _IMAGES and file.is_file()
    ]
    if not files:
        raise InputError(f"--data {str(path)!r}: there are no images in folders of it, one folder per class")
    spool = Spool(lambda message: InputError(f"--data {str(path)!r}: {message}; resize the images to one size"))
    for image in _read_images(files):
        spool.append(image[None])
    rows = spool.rows()
    labels = np.array([label for _, label in files])
    return Samples(rows, labels, scale=1 / np.iinfo(rows.dtype).max, class_names=tuple(classes))


def _read_images(files: list[tuple[Path, int]]) -> Iterator[NDArray]:
    """Yield the pixels, channels first, of 8 or 16 bits; the first image says whether all are gray."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading images needs Pillow: pip install 'rai-toolbox[cli]'") from None
    gray: bool | None = None
    depth: int | None = None
    for file, _ in files:
        try:
            with Image.open(file) as image:
                if image.mode == "F":
                    raise ValueError("its pixels are floats, of no known range; give arrays in an .npz")
                deep = image.mode.startswith("I")
                if depth not in (None, 16 if deep else 8):
                    raise ValueError(f"it has {16 if deep else 8} bits a pixel, the ones before it have {depth}")
                depth = 16 if deep else 8
                gray = deep or image.mode in ("1", "L") if gray is None else gray
                # What Pillow converts from 16 bits to 8 it cuts off at 255.
                pixels = _deep_pixels(image) if deep else np.asarray(image.convert("L" if gray else "RGB"))
        except Exception as error:
            raise InputError(f"the image {str(file)!r} cannot be read: {' '.join(str(error).split())[:200]}") from None
        yield pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep_pixels(image: Any) -> NDArray:
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels are not of 8 or 16 bits")
    return pixels.astype(np.uint16)
