"""How robust a model is: measured, checked, and written down for people and for programs."""

from __future__ import annotations

from ._compare import ComparedPoint, Comparison, compare
from ._data import load_data
from ._errors import EvaluationFailed, InputError
from ._evaluation import evaluate
from ._models import load_model, load_preprocess
from ._results import ClassRow, Curve, Evaluation, Examples, Finding, Point
from ._samples import Samples

__all__ = [
    "ClassRow",
    "ComparedPoint",
    "Comparison",
    "Curve",
    "Evaluation",
    "EvaluationFailed",
    "Examples",
    "Finding",
    "InputError",
    "Point",
    "Samples",
    "compare",
    "evaluate",
    "load_data",
    "load_model",
    "load_preprocess",
]
