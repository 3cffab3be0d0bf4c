"""Load the samples that `--data` names."""

from __future__ import annotations

import reprlib
from pathlib import Path

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._imports import call_named, names_function
from rai_toolbox.robustness.data._digits import digits_samples
from rai_toolbox.robustness.data._images import load_images
from rai_toolbox.robustness.data._npz import NpzArchive
from rai_toolbox.robustness.data._samples import Samples, as_samples
from rai_toolbox.robustness.data._tables import load_table

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
        If there is no such data, or it cannot be used.
    """
    if spec == "digits":
        return digits_samples(seed)
    if names_function(spec):
        return as_samples(call_named(spec, arg("data")), what=f"{arg('data')} {spec}")
    path = Path(spec)
    kind = path.suffix.lower()
    if label_column is not None and kind not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"{arg('label_column')} names a column of a table, but {arg('data')} {spec!r} is none")
    if "\0" in spec or not path.exists():
        raise InputError(f"{arg('data')}: there is no file or folder {spec!r}; {_FORMS}")
    if path.is_dir():
        return load_images(path)
    if kind in _PICKLES:
        raise InputError(
            f"{arg('data')} {spec!r} is a pickle, which could run code when read; save the arrays with"
            " numpy.savez('data.npz', x=x, y=y)"
        )
    if kind in (".csv", ".tsv", ".parquet"):
        return load_table(path, label_column)
    if kind == ".npz":
        return _npz_samples(path)
    raise InputError(f"{arg('data')} {spec!r} has an unknown file type; {_FORMS}")


def _npz_samples(path: Path) -> Samples:
    archive = NpzArchive(path)
    missing = [name for name in ("x", "y") if name not in archive]
    if missing:
        names = [*map(reprlib.repr, archive.names[:8]), *["..."][: len(archive.names) > 8]]
        raise InputError(
            f"{str(path)!r} has no array {' and no array '.join(map(repr, missing))}; it has"
            f" {', '.join(names) or 'none'}; write it with numpy.savez(file, x=x, y=y)"
        )
    class_names, feature_names = (
        tuple(map(str, archive.array(key).reshape(-1))) if key in archive else None
        for key in ("class_names", "feature_names")
    )
    return Samples(archive.rows("x"), archive.array("y"), class_names=class_names, feature_names=feature_names)
