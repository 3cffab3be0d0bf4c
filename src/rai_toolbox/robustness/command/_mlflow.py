"""--log mlflow: the figures, files and checks of an evaluation as a run of MLflow."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rai_toolbox._extras import install_command
from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._writing import EVALUATION_FILES

# Unless the user's environment says otherwise: a server that is away is told in seconds and not in minutes, standard
# output holds nothing but the command's own, and nobody is told of this run but the server that was asked for.
_QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_AT_ONCE = 100


def check_mlflow() -> None:
    """See that MLflow is there, before any figure is computed for it.

    Raises InputError if it is not installed.
    """
    try:
        with _quiet():
            import mlflow  # noqa: F401
    except ImportError:
        raise InputError(f"--log mlflow needs MLflow: {install_command('mlflow')}") from None


def log_to_mlflow(evaluation: Evaluation, folder: Path) -> None:
    """Log an evaluation whose folder is written, as one run, where MLflow's own environment variables say.

    Radii are not whole numbers, as MLflow's steps are: step i of a norm is its i-th radius, which the metric
    ``NORM/epsilon`` has.
    """
    with _quiet():
        import mlflow
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        name = str(evaluation.settings.get("model", "rai-toolbox"))
        with mlflow.start_run(run_name=name[:200], nested=mlflow.active_run() is not None) as run:
            client, identity = mlflow.MlflowClient(), run.info.run_id
            params = [Param(key, value) for key, value in _parameters(evaluation).items()]
            tags = [RunTag(key, value) for key, value in _tags(evaluation).items()]
            metrics = [Metric(key, value, now, step) for key, value, step in _metrics(evaluation)]
            for start in range(0, max(len(params), len(tags), len(metrics)), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                client.log_batch(identity, metrics=metrics[part], params=params[part], tags=tags[part])
            for file in (*EVALUATION_FILES, "config.toml"):
                if (folder / file).exists():
                    client.log_artifact(identity, str(folder / file))


def _parameters(evaluation: Evaluation) -> dict[str, str]:
    flat = dict(_flat("", evaluation.settings))
    flat |= {f"data.{name}": str(value) for name, value in evaluation.data.items()}
    # A bound per feature is in the files.
    return {_key(name): value for name, value in flat.items() if len(value) <= 500}


def _flat(prefix: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", str(value)


def _metrics(evaluation: Evaluation) -> Iterator[tuple[str, float, int]]:
    """Yield the name, the value and the step of each figure; infinite ones, which some stores refuse, are left out."""
    measure = "accuracy" if evaluation.task == "classification" else "mean_absolute_error"
    for norm, curve in evaluation.curves.items():
        for step, point in enumerate(curve.points):
            yield f"{norm}/epsilon", point.epsilon, step
            yield from _figure(f"{norm}/{measure}", point.value, point.low, point.high, step)
        for step, mean in enumerate(curve.average):
            yield from _figure(f"{norm}/average_error", mean.error, mean.low, mean.high, step)
        if curve.median_distance is not None:
            yield f"{norm}/median_distance", curve.median_distance, 0
    for name, corruption in evaluation.corruptions.items():
        where = f"corruption/{_key(name)}"
        for step, one in enumerate(corruption.points):
            yield f"{where}/severity", one.severity, step
            yield from _figure(f"{where}/{measure}", one.value, one.low, one.high, step)


def _figure(name: str, value: float, low: float, high: float, step: int) -> Iterator[tuple[str, float, int]]:
    for key, entry in ((name, value), (f"{name}_low", low), (f"{name}_high", high)):
        if math.isfinite(entry):
            yield key, entry, step


def _tags(evaluation: Evaluation) -> dict[str, str]:
    tags = {
        "rai_toolbox.version": str(evaluation.environment["rai_toolbox"]),
        "complete": str(evaluation.complete).lower(),
        "trusted": str(evaluation.trusted).lower(),
    }
    tags |= {_key(f"evidence.{one.figures}"): f"{one.kind} ({one.gives})" for one in evaluation.evidence}
    for finding in evaluation.findings:
        tags[_key(f"check.{finding.check}")] = finding.verdict
        if finding.verdict in ("warning", "distrust"):
            tags[_key(f"check.{finding.check}.summary")] = finding.summary
    return tags


def _key(name: str) -> str:
    """Return a name in the letters that MLflow has for them."""
    return re.sub(r"[^\w.\- ]", "_", name, flags=re.ASCII)[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    logger = logging.getLogger("mlflow")
    level = logger.level
    os.environ.update({name: value for name, value in _QUIET.items() if before[name] is None})
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
