"""How robust a model is: measured, checked and reported. The entrance is `evaluate`, in `run/_evaluate.py`."""

from __future__ import annotations

from rai_toolbox.robustness._errors import EvaluationFailed, InputError
from rai_toolbox.robustness._evidence import AveragePoint, Corruption, CorruptionPoint, Evidence
from rai_toolbox.robustness._results import ClassRow, Curve, Examples, Finding, Point
from rai_toolbox.robustness.data._load import load_data
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import load_model, load_preprocess
from rai_toolbox.robustness.report._compare import ComparedPoint, Comparison, compare
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._transfer import Transfer
from rai_toolbox.robustness.run._evaluate import evaluate

__all__ = [
    "AveragePoint",
    "ClassRow",
    "ComparedPoint",
    "Comparison",
    "Corruption",
    "CorruptionPoint",
    "Curve",
    "Evaluation",
    "EvaluationFailed",
    "Evidence",
    "Examples",
    "Finding",
    "InputError",
    "Point",
    "Samples",
    "Transfer",
    "compare",
    "evaluate",
    "load_data",
    "load_model",
    "load_preprocess",
]
