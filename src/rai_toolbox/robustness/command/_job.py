"""One run of `rai-toolbox evaluate`: from a job to a report in a folder."""

from __future__ import annotations

import contextlib
import os
import shlex
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rai_toolbox.robustness._errors import EvaluationFailed, InputError, WriteFailed, arg
from rai_toolbox.robustness._files import as_folder, claimed, write_text
from rai_toolbox.robustness._text import did_you_mean, one_line
from rai_toolbox.robustness.attack._corruptions import load_corruptions
from rai_toolbox.robustness.command._config import to_toml
from rai_toolbox.robustness.command._junit import check_junit_file, junit_xml
from rai_toolbox.robustness.command._mlflow import check_mlflow, log_to_mlflow
from rai_toolbox.robustness.command._options import ExitCode, Job, Radii, Threshold, numbers
from rai_toolbox.robustness.command._thresholds import held
from rai_toolbox.robustness.data._load import load_data
from rai_toolbox.robustness.data._npz import NpzArchive, read_npy
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import Evaluated, load_model, load_preprocess
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._writing import EVALUATION_FILES
from rai_toolbox.robustness.run._evaluate import evaluate
from rai_toolbox.robustness.run._run import Progress
from rai_toolbox.robustness.session._journal import Journal
from rai_toolbox.robustness.session._team import Team, join

_CONFIG = "config.toml"


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    evaluation: Evaluation
    folder: Path  # where the report is
    exit_code: ExitCode  # of the command
    reasons: tuple[str, ...] = ()  # why the exit code is not 0
    leads: bool = True  # whether this process prints the result


def run_job(job: Job, progress: Progress | None = None) -> Outcome:
    """Load, evaluate, write the report.

    Raises InputError if something given cannot be used.
    Raises EvaluationFailed if it began and could not go on.
    """
    team = join()
    try:
        with contextlib.ExitStack() as stack:
            return _run(job, team, progress, stack)
    except WriteFailed as error:
        raise EvaluationFailed(
            f"{error}; finished batches are kept: make room, run again with {arg('resume', True)}"
        ) from error
    finally:
        team.leave()


def evaluated_model(place: str) -> Evaluated:
    """Return the model of an evaluation, by the config.toml of its folder.

    Raises InputError if there is none, or it cannot be loaded: names of files in it begin where the evaluation began.
    """
    path = Path(place)
    file = (path if path.is_dir() else path.parent) / _CONFIG
    if not file.is_file():
        raise InputError(
            f"{place!r} has no config.toml, which says how to load its model: compare in Python, with {arg('models')}"
        )
    job = Job.make({}, str(file))
    if job.model is None:
        raise InputError(f"{str(file)!r} names no model")
    device = _device(job.device or "cpu")
    model = load_model(job.model, weights=job.weights, device=device, seed=job.seed)
    preprocess = load_preprocess(job.preprocess, device) if job.preprocess else None
    return Evaluated(model, preprocess, job.output)


def _run(job: Job, team: Team, progress: Progress | None, stack: contextlib.ExitStack) -> Outcome:
    if job.model is None or job.data is None:
        missing = " and ".join(f"--{name}" for name in ("model", "data") if getattr(job, name) is None)
        raise InputError(
            f"{missing} must be given; to see what comes out: rai-toolbox evaluate --model digits --data digits"
        )
    if job.strict and not job.diagnostics:
        raise InputError("--strict goes by the checks, which --no-diagnostics leaves out: give one of the two")
    if not 0 <= job.seed < 2**63:
        given = job.seed if abs(job.seed) < 10**40 else "a longer one"
        raise InputError(f"--seed must be a whole number from 0 to 2**63 - 1, got {given}")
    model_spec, data_spec = job.model, job.data
    grids = _grids(job)
    _check_thresholds(job)
    if job.junit is not None:
        check_junit_file(job.junit)
    if job.log:
        check_mlflow()
    folder = as_folder(job.out)
    team.together(lambda: stack.enter_context(claimed(folder, (_CONFIG, *EVALUATION_FILES))) if team.leads else None)
    device = job.device or "cpu"
    model = team.leaders_first(
        lambda: load_model(model_spec, weights=job.weights, device=_device(device), seed=job.seed)
    )
    corruptions = load_corruptions(job.corruption)
    preprocess = load_preprocess(job.preprocess, _device(device)) if job.preprocess else None
    samples = team.together(lambda: _samples(job, data_spec))
    # Options that are arguments of `evaluate` are passed on; the others become arguments here.
    passed = {name: getattr(job, name) for name in signature(evaluate).parameters if hasattr(job, name)}
    passed |= {
        "norms": job.norm,
        "epsilons": grids,
        "extra_epsilons": {
            norm: [threshold.epsilon for threshold in job.fail_under if threshold.norm == norm] for norm in job.norm
        },
        "bounds": _bounds(job.bounds),
        "mask": _mask(job, samples),
        "preprocess": preprocess,
        "corruptions": corruptions,
        "severities": numbers("--severities", job.severities),
        "device": _device(device),
        "folder": folder,
        "progress": progress,
        "described": _described(job),
    }
    evaluation = evaluate(**passed | {"model": model, "data": samples})
    if team.leads:
        write_text(folder / _CONFIG, to_toml(job.to_config()))
        evaluation.save(folder)
    team.gather(None)
    if evaluation.complete:
        # In every process: without a shared folder each machine has its own.
        Journal(folder).finish()
    return _outcome(job, evaluation, folder, team)


def _outcome(job: Job, evaluation: Evaluation, folder: Path, team: Team) -> Outcome:
    code = ExitCode.OK
    thresholds = held(job.fail_under, evaluation)
    reasons = [one.reason for one in thresholds if one.reason is not None]
    if reasons:
        code = ExitCode.BELOW_THRESHOLD
    if job.strict and not evaluation.trusted:
        code = ExitCode.NOT_TRUSTED
        failed = ", ".join(finding.check for finding in evaluation.findings if finding.verdict == "distrust")
        reasons.append(f"the checks say not to trust the figures ({failed})")
    elif job.strict and not evaluation.complete:
        code = ExitCode.NOT_TRUSTED
        reasons.append("the time limit ended the run before the checks were made")
    elif job.strict and evaluation.unmade:
        code = ExitCode.NOT_TRUSTED
        reasons.append(f"checks could not be made, and count as failed with --strict ({', '.join(evaluation.unmade)})")
    if team.leads and job.junit is not None:
        write_text(Path(job.junit), junit_xml(evaluation, thresholds, strict=job.strict))
    if team.leads and job.log and (failed := _log(evaluation, folder)):
        code = code or ExitCode.NOT_LOGGED
        reasons.append(failed)
    return Outcome(evaluation, folder, code, tuple(reasons), team.leads)


def _log(evaluation: Evaluation, folder: Path) -> str | None:
    """Log to MLflow; return what is to be said where that fails: the folder is written by now."""
    try:
        log_to_mlflow(evaluation, folder)
    except Exception as error:  # of the server, its client, the network, a plug-in
        return f"not logged to MLflow, {one_line(error)}; all results are in {str(folder)!r}"
    return None


def _described(job: Job) -> dict[str, Any]:
    described = {
        name: value for name in ("model", "data", "weights", "preprocess") if (value := getattr(job, name)) is not None
    }
    described["command"] = shlex.join(["rai-toolbox", "evaluate", "--config", "config.toml"])
    return described


def _samples(job: Job, spec: str) -> Samples:
    samples = load_data(spec, label_column=job.label_column, seed=job.seed)
    if job.samples is None:
        return samples
    if job.samples < 1:
        raise InputError(f"--samples must be at least 1, got {job.samples}")
    return samples.limited(job.samples)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        holds_numbers = not torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError) as error:
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            known.append("mps")
        raise InputError(f"--device {name!r} cannot be used: this torch has {', '.join(known)}") from error
    if not holds_numbers:
        raise InputError("--device 'meta' cannot be used: its tensors hold no numbers")
    return device


def _grids(job: Job) -> dict[str, list[float]] | None:
    grids: dict[str, list[float]] = {}
    for radii in job.epsilons:
        if radii.norm is not None:
            _check_norm("--epsilons", radii, job)
        for norm in job.norm if radii.norm is None else [radii.norm]:
            grids.setdefault(norm, []).extend(radii.values)
    return grids or None


def _check_thresholds(job: Job) -> None:
    for threshold in job.fail_under:
        _check_norm("--fail-under", threshold, job)
        if job.task != "classification":
            raise InputError("--fail-under is for classification: it compares accuracies")


def _check_norm(flag: str, value: Radii | Threshold, job: Job) -> None:
    if value.norm not in job.norm:
        norms = ", ".join(job.norm)
        raise InputError(f"{flag} {value.word!r}: the norms are {norms}, give --norm {value.norm or 'NORM'} too")


def _bounds(word: str) -> Any:
    if word == "auto":
        return "auto"
    if word == "none":
        return None
    if word.endswith(".npz"):
        archive = NpzArchive(Path(word))
        for name in ("lower", "upper"):
            if name not in archive:
                raise InputError(
                    f"--bounds {word!r} has no array {name!r}; it must hold lower and upper, each in the"
                    " shape of a sample"
                )
        return archive.array("lower"), archive.array("upper")
    values = numbers("--bounds", word, finite=False)
    if len(values) != 2:
        raise InputError(f"--bounds {word!r}: expected LOWER,UPPER, an .npz file with lower and upper, auto or none")
    return values[0], values[1]


def _mask(job: Job, samples: Samples) -> np.ndarray | None:
    if job.mask is None and not job.frozen:
        return None
    mask = np.ones(samples.shape, dtype=bool)
    if job.mask is not None:
        if not job.mask.endswith(".npy") or not Path(job.mask).is_file():
            raise InputError(
                f"--mask {job.mask!r}: expected a .npy file in the shape of one sample, True where it may change"
            )
        array = read_npy(Path(job.mask))
        if array.shape != samples.shape or array.dtype.kind not in "bui":
            raise InputError(
                f"--mask {job.mask!r} has shape {array.shape} and dtype {array.dtype}, expected that of one sample,"
                f" {samples.shape}, and bool"
            )
        mask &= array.astype(bool)
    for word in job.frozen:
        for name in word.split(","):
            mask.reshape(-1)[_feature(name.strip(), samples)] = False
    return mask


def _feature(name: str, samples: Samples) -> int:
    names = list(samples.feature_names or ())
    if name in names:
        return names.index(name)
    count = int(np.prod(samples.shape))
    if name.isdecimal() and int(name) < count:
        return int(name)
    raise InputError(
        "--frozen: there is no feature"
        f" {name!r}{did_you_mean(name, names) if names else f'; give numbers from 0 to {count - 1}'}"
    )
