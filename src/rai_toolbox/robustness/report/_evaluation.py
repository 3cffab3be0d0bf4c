"""`Evaluation`: a result that can be shown, saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rai_toolbox.robustness._files import as_folder
from rai_toolbox.robustness._results import Results
from rai_toolbox.robustness.report._pictures import plot_curves
from rai_toolbox.robustness.report._schema import read, to_dict, to_json
from rai_toolbox.robustness.report._writing import EVALUATION_FILES, write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True)
class Evaluation(Results):
    """The result of `evaluate`.

    Attributes
    ----------
    task : {"classification", "regression"}
        The kind of prediction.
    complete : bool
        Whether everything was done; a time limit leaves False.
    curves : dict of str to Curve
        By norm.
    findings : tuple of Finding
        The findings of the checks.
    index, label, prediction : NDArray
        Of every evaluated sample: its number, its label (or target values), the model's answer to it unperturbed.
    correct : NDArray of bool
        Whether that is right (classification).
    distance : dict of str to NDArray
        By norm: how far the nearest error found is; 0 where wrong from the start, infinite where none was
        found (classification).
    error : dict of str to NDArray
        By norm, shape (points, samples): the absolute error at each point of the curve (regression).
    class_names : tuple of str
        The names of the classes.
    settings, data, environment, timings : dict
        The arguments, a summary of the data, versions and hardware, seconds per stage.
    examples : dict of str to Examples
        By norm, for the gallery; of all samples where they were kept.
    feature_names : tuple of str or None
        Of a table.
    corruptions : dict of str to Corruption
        By name, where corruptions were given.
    ids : tuple of int or str, or None
        What the data call each evaluated sample.
    found_by : dict of str to NDArray of str
        By norm, which attack found that distance or error, in its shape: ``"minimum_norm"``, ``"worst_case"``, one of
        the stronger attacks or of queries (``"BPDA"``, ``"differences"``, ``"transfer"``, ``"decisions"``, ``"random
        search"``), ``"random point"``, ``"also-try"``; empty for the unperturbed sample, and where nothing was found.
    error_rate : dict of str to NDArray
        Of a random model, by norm, shape (points, samples, 3): at each point of the curve the rate of errors among
        fresh draws at the worst point found of each sample, and the ends of its 95 % (Clopper-Pearson) interval. Of a
        sample that does not stand, at the error that broke it; NaN where a time limit came first.
    evidence : tuple of Evidence
        What the figures are evidence of.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json; infinite distances are null there."""
        return to_dict(self)

    def to_json(self) -> str:
        """Return results.json's text: strict JSON, no NaN and no Infinity in it."""
        return to_json(self)

    def to_pandas(self) -> DataFrame:
        """Return one row per sample: its label, prediction and distances (or errors at the largest epsilon).

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(self.columns()).set_index("index")

    def plot(self) -> Figure:
        """Return a picture of the curves with their intervals, made by matplotlib."""
        return plot_curves({"": self})

    def save(self, folder: str | Path) -> Path:
        """Write report.html, card.md, curve.png, results.json, examples.npz, figures as CSV; return the folder.

        Raises
        ------
        InputError
            If the folder cannot be made or written to, or another run writes there.
        WriteFailed
            If the disk is full. The files of an earlier run are left as they are then.
        """
        return write_files(as_folder(folder), EVALUATION_FILES, self)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Return the evaluation that a folder or results.json holds, without its examples.

        Raises
        ------
        InputError
            If there is none, or it is of another schema.
        """
        return cls(**vars(read(Path(path))))
