"""One run of `rai-toolbox evaluate`: from words, of flags or a file, to a report in a folder."""

from __future__ import annotations

import math
import os
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._files import prepare_folder, write_text
from rai_toolbox.robustness._text import did_you_mean
from rai_toolbox.robustness.attack._settings import NORMS
from rai_toolbox.robustness.command._config import read_config, to_toml
from rai_toolbox.robustness.data._load import load_data
from rai_toolbox.robustness.data._npz import NpzArchive, read_npy
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import load_model, load_preprocess
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.run._evaluate import evaluate
from rai_toolbox.robustness.run._run import Progress
from rai_toolbox.robustness.session._journal import Journal
from rai_toolbox.robustness.session._team import Team, join

__all__ = ["EXIT", "Job", "Outcome", "run_job"]

#: The exit codes of the command.
EXIT = {"ok": 0, "below threshold": 1, "bad input": 2, "not trusted": 3, "failed": 4, "interrupted": 130}

DEFAULT_OUT = "rai-report"


@dataclass(frozen=True)
class Job:
    """What to evaluate and how, in the words of the command line; the names are those of the flags and of
    the config file.
    """

    model: str | None = None
    data: str | None = None
    weights: str | None = None
    preprocess: str | None = None
    label_column: str | None = None
    task: str = "classification"
    norm: tuple[str, ...] = ("l2",)
    epsilons: tuple[str, ...] = ()
    steps: int | None = None
    restarts: int | None = None
    batch_size: int = 128
    bounds: str = "auto"
    mask: str | None = None
    frozen: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 0
    device: str | None = None
    out: str = DEFAULT_OUT
    resume: bool = False
    overwrite: bool = False
    time_limit: float | None = None
    diagnostics: bool = True
    strict: bool = False
    fail_under: tuple[str, ...] = ()

    @classmethod
    def make(cls, flags: Mapping[str, Any], config: str | None = None) -> Job:
        """Return the job of a config file with flags on top; a flag that is None or empty was not given.

        Raises
        ------
        InputError
            If the file or a value of it cannot be used.
        """
        values: dict[str, Any] = {}
        known = {entry.name: entry for entry in fields(cls)}
        if config is not None:
            for name, value in read_config(Path(config)).items():
                key = name.replace("-", "_")
                if key not in known:
                    raise InputError(f"{config!r} has an unknown entry {name!r}{did_you_mean(key, list(known))}")
                values[key] = _typed(f"{config!r}: {name}", value, known[key].type)
        values |= {name: value for name, value in flags.items() if value is not None and value != () and value != []}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """Return what a config file that repeats this job holds: all that is not the default."""
        left_out = {"out", "resume", "overwrite"}
        return {
            entry.name.replace("_", "-"): value
            for entry in fields(self)
            if entry.name not in left_out and (value := getattr(self, entry.name)) != entry.default
        }


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    Attributes
    ----------
    evaluation : Evaluation
        The result.
    folder : Path
        Where the report is.
    exit_code : int
        Of the command.
    reasons : tuple of str
        Why the exit code is not 0.
    leads : bool
        Whether this process is the one to speak.
    """

    evaluation: Evaluation
    folder: Path
    exit_code: int
    reasons: tuple[str, ...] = ()
    leads: bool = True


def run_job(job: Job, progress: Progress | None = None) -> Outcome:
    """Load, evaluate, write the report.

    Raises
    ------
    InputError
        If something given cannot be used.
    EvaluationFailed
        If it began and could not go on.
    """
    team = join()
    try:
        return _run(job, team, progress)
    finally:
        team.leave()


def _run(job: Job, team: Team, progress: Progress | None) -> Outcome:
    if job.model is None or job.data is None:
        missing = " and ".join(f"--{name}" for name in ("model", "data") if getattr(job, name) is None)
        raise InputError(
            f"{missing} must be given; to see what comes out: rai-toolbox evaluate --model digits --data digits"
        )
    if job.strict and not job.diagnostics:
        raise InputError("--strict goes by the checks, which --no-diagnostics leaves out: give one of the two")
    model_spec, data_spec = job.model, job.data
    grids = _grids(job)
    thresholds = [_threshold(word, job, grids) for word in job.fail_under]
    folder = Path(job.out)
    team.together(lambda: prepare_folder(folder) if team.leads else None)
    device = job.device or "cpu"
    model = team.leaders_first(
        lambda: load_model(model_spec, weights=job.weights, device=_device(device), seed=job.seed)
    )
    preprocess = load_preprocess(job.preprocess, _device(device)) if job.preprocess else None
    samples = team.together(lambda: _samples(job, data_spec))
    evaluation = evaluate(
        model,
        samples,
        norms=job.norm,
        epsilons=grids,
        extra_epsilons={norm: [epsilon for _, where, epsilon in thresholds if where == norm] for norm in job.norm},
        task=job.task,
        bounds=_bounds(job.bounds),
        mask=_mask(job, samples),
        preprocess=preprocess,
        steps=job.steps,
        restarts=job.restarts,
        batch_size=job.batch_size,
        seed=job.seed,
        device=_device(device),
        diagnostics=job.diagnostics,
        folder=folder,
        resume=job.resume,
        overwrite=job.overwrite,
        time_limit=job.time_limit,
        progress=progress,
        described=_described(job),
    )
    if team.leads:
        write_text(folder / "config.toml", to_toml(job.to_config()))
        evaluation.save(folder)
    team.gather(None)
    if evaluation.complete:
        # In every process: without a shared folder each machine has its own.
        Journal(folder).finish()
    return _outcome(job, evaluation, folder, thresholds, team)


def _outcome(
    job: Job, evaluation: Evaluation, folder: Path, thresholds: Sequence[tuple[float, str, float]], team: Team
) -> Outcome:
    reasons = []
    code = EXIT["ok"]
    for least, norm, epsilon in thresholds:
        value = evaluation.curves[norm].at(epsilon).value if norm in evaluation.curves else 1.0
        if not value >= least:
            code = EXIT["below threshold"]
            reasons.append(f"accuracy at {norm}:{epsilon:g} is {value:.4f}, below {least:g}")
        elif not evaluation.complete:
            # What has not been tried would have stood.
            code = EXIT["below threshold"]
            reasons.append(f"accuracy at {norm}:{epsilon:g} is not known to reach {least:g}: the run is partial")
    if job.strict and not evaluation.trusted:
        code = EXIT["not trusted"]
        failed = ", ".join(finding.check for finding in evaluation.findings if finding.verdict == "distrust")
        reasons.append(f"the checks say not to trust the figures ({failed})")
    elif job.strict and not evaluation.complete:
        code = EXIT["not trusted"]
        reasons.append("the time limit ended the run before the checks were made")
    return Outcome(evaluation, folder, code, tuple(reasons), team.leads)


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
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--device {name!r} cannot be used: {reason}") from None
    return device


def _grids(job: Job) -> dict[str, list[float]] | None:
    """Return the radii of ``0.1,0.2`` (for every norm) and ``l2:0.5,1`` (for one)."""
    grids: dict[str, list[float]] = {}
    for word in job.epsilons:
        norm, colon, numbers = word.rpartition(":")
        if colon and norm not in job.norm:
            raise InputError(
                f"--epsilons {word!r}: the norms are {', '.join(job.norm)}, give --norm {norm or 'NORM'} too"
            )
        values = _numbers("--epsilons", numbers)
        for name in [norm] if colon else job.norm:
            grids.setdefault(name, []).extend(values)
    return grids or None


def _threshold(word: str, job: Job, grids: Mapping[str, Sequence[float]] | None) -> tuple[float, str, float]:
    """Return accuracy, norm and epsilon of ``0.6@l2:0.5``."""
    form = f"--fail-under {word!r}: expected ACCURACY@NORM:EPSILON, as in 0.6@l2:0.5"
    accuracy, at, where = word.partition("@")
    norm, colon, epsilon = where.partition(":")
    if not at or not colon:
        raise InputError(form)
    if norm not in job.norm:
        raise InputError(
            f"--fail-under {word!r}: the norms are {', '.join(job.norm)}, give --norm {norm} too"
            if norm in NORMS
            else form
        )
    if job.task != "classification":
        raise InputError("--fail-under is for classification: it compares accuracies")
    try:
        least, radius = float(accuracy), float(epsilon)
    except ValueError:
        raise InputError(form) from None
    if not 0 <= least <= 1 or not (math.isfinite(radius) and radius > 0):
        raise InputError(f"--fail-under {word!r}: the accuracy must be in [0, 1] and epsilon above 0")
    return least, norm, radius


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
    values = _numbers("--bounds", word, finite=False)
    if len(values) != 2:
        raise InputError(f"--bounds {word!r}: expected LOWER,UPPER, an .npz file with lower and upper, auto or none")
    return values[0], values[1]


def _numbers(flag: str, word: str, *, finite: bool = True) -> list[float]:
    try:
        values = [float(part) for part in word.split(",")]
    except ValueError:
        raise InputError(f"{flag} {word!r}: expected numbers separated by commas") from None
    if any(math.isnan(value) or (finite and math.isinf(value)) for value in values):
        raise InputError(f"{flag} {word!r}: expected finite numbers")
    return values


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


def _typed(where: str, value: Any, kind: Any) -> Any:
    """Return a value of a config file in the type of its field, which is a string: annotations are not evaluated."""
    many = kind.startswith("tuple")
    if many:
        values = value if isinstance(value, list) else [value]
        if any(isinstance(entry, (dict, list)) for entry in values):
            raise InputError(f"{where} must be a list of plain values, got {reprlib.repr(value):.80}")
        if where.endswith(" epsilons") and all(_is_number(entry) for entry in values):
            return (",".join(repr(float(entry)) for entry in values),)
        return tuple(str(entry) for entry in values)
    if kind.startswith("bool"):
        fits = isinstance(value, bool)
    elif kind.startswith("int"):
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif kind.startswith("float"):
        fits = _is_number(value)
    else:
        fits = isinstance(value, str)
        if where.endswith(" bounds") and isinstance(value, list) and all(_is_number(entry) for entry in value):
            return ",".join(repr(float(entry)) for entry in value)
    if not fits:
        raise InputError(f"{where} must be {_KINDS[kind.partition(' ')[0]]}, got {reprlib.repr(value):.80}")
    return value


_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
