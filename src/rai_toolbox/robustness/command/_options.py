"""The options of `rai-toolbox evaluate`: each is one field of `Job`, for the flags and for config files alike."""

from __future__ import annotations

import enum
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rai_toolbox.perturbations._ball import check_norm
from rai_toolbox.robustness._errors import InputError, spelled
from rai_toolbox.robustness._text import did_you_mean
from rai_toolbox.robustness.command._config import read_config


class ExitCode(enum.IntEnum):
    """The exit codes of the command."""

    OK = 0
    BELOW_THRESHOLD = 1
    BAD_INPUT = 2
    NOT_TRUSTED = 3
    FAILED = 4
    NOT_LOGGED = 5
    INTERRUPTED = 130
    TERMINATED = 143


def number(word: str) -> float:
    """Return the number that a word stands for: 0.5, or a fraction such as 8/255."""
    above, slash, below = word.partition("/")
    return float(above) / float(below) if slash else float(word)


def numbers(flag: str, word: str, *, finite: bool = True) -> tuple[float, ...]:
    """Return numbers that are separated by commas."""
    try:
        values = tuple(map(number, word.split(",")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise InputError(
            f"{flag} {reprlib.repr(word)}: expected numbers separated by commas, as in 0.5,1 or 8/255"
        ) from None
    if any(math.isnan(value) or (finite and math.isinf(value)) for value in values):
        raise InputError(f"{flag} {reprlib.repr(word)}: expected finite numbers")
    return values


def _norm(word: str) -> str:
    """Return the name that the evaluation has for a norm; a word that is none is left for it to refuse."""
    try:
        return check_norm(word)
    except ValueError:
        return word


def _log(word: str) -> str:
    if word.lower() != "mlflow":
        raise InputError(f"--log must be mlflow, got {word!r}")
    return "mlflow"


@dataclass(frozen=True)
class Radii:
    """Radii to report, for one norm or for all: ``l2:0.5,1`` or ``0.25,0.5``."""

    word: str
    norm: str | None
    values: tuple[float, ...]

    @classmethod
    def parse(cls, word: str) -> Radii:
        norm, colon, values = word.rpartition(":")
        return cls(word, _norm(norm) if colon else None, numbers("--epsilons", values))

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class Threshold:
    """The least accuracy at a radius: ``0.6@l2:0.5``."""

    word: str
    accuracy: float
    norm: str
    epsilon: float

    @classmethod
    def parse(cls, word: str) -> Threshold:
        form = f"--fail-under {word!r}: expected ACCURACY@NORM:EPSILON, as in 0.6@l2:0.5"
        least, _, where = word.partition("@")
        norm, _, radius = where.partition(":")
        try:
            accuracy, epsilon = float(least), number(radius)
            norm = check_norm(norm)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise InputError(form) from None
        if not 0 <= accuracy <= 1 or not (math.isfinite(epsilon) and epsilon > 0):
            raise InputError(f"--fail-under {word!r}: the accuracy must be in [0, 1] and epsilon above 0")
        return cls(word, accuracy, norm, epsilon)

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class Flag:
    """How an option is shown by ``--help``, and how its words become a value."""

    help: str  # one sentence
    metavar: str | None = None  # the placeholder of its value; None for a switch
    parse: Callable[[str], Any] = str  # from a word to a value
    spellings: str | None = None  # other than ``--name``, in the way of typer
    separator: str | None = None  # one word may hold several values


@dataclass(frozen=True)
class Job:
    """One evaluation, as the user asks for it; each field is a flag and an entry of the config file."""

    model: Annotated[
        str | None,
        Flag("digits, file.py:function, package.module:function, or a .pt2, TorchScript or ONNX file.", "MODEL"),
    ] = None
    data: Annotated[
        str | None,
        Flag(
            "digits, an .npz file with x and y, a .csv or .parquet table, a folder of images per class, or"
            " file.py:function.",
            "DATA",
        ),
    ] = None
    weights: Annotated[
        str | None, Flag("A state dict (.safetensors, or of torch.save) to load into the model.", "FILE")
    ] = None
    output: Annotated[
        str | None,
        Flag("Which part of what the model returns are the logits: a name, as logits, or a number.", "PART"),
    ] = None
    preprocess: Annotated[
        str | None,
        Flag(
            "normalize:MEAN/STD, imagenet, cifar10 or file.py:function of a batch; epsilon stays in the data's units.",
            "WHAT",
        ),
    ] = None
    label_column: Annotated[
        str | None, Flag("The column of a table with the label; label, target, class or y is found without.", "NAME")
    ] = None
    classes: Annotated[
        str | None,
        Flag("Names of the classes in the order of the model's outputs, one a line, or .json.", "FILE"),
    ] = None
    task: Annotated[str, Flag("classification (default) or regression.", "TASK")] = "classification"
    norm: Annotated[
        tuple[str, ...], Flag("l2 (default), linf, l1 or l0; several as in linf,l2.", "NORM", _norm, separator=",")
    ] = ("l2",)
    epsilons: Annotated[
        tuple[Radii, ...],
        Flag(
            "Radii to report: 0.25,0.5,1 or 8/255 or, for one norm, l2:0.5,1. Default: a grid that fits the data.",
            "NUMBERS",
            Radii.parse,
        ),
    ] = ()
    budget: Annotated[
        str,
        Flag(
            "quick, standard (default) or thorough: how much work, where the next flags do not say; quick is a look.",
            "BUDGET",
        ),
    ] = "standard"
    steps: Annotated[int | None, Flag("Steps of each run of a solver (default 50; quick 10).", "COUNT")] = None
    restarts: Annotated[
        int | None,
        Flag("Runs of a solver per sample, from different points (default 18; quick 2).", "COUNT"),
    ] = None
    batch_size: Annotated[int, Flag("Samples at a time (default 128).", "COUNT")] = 128
    bounds: Annotated[
        str,
        Flag("LOWER,UPPER, an .npz file with lower and upper, none, or auto (default): images stay images.", "BOUNDS"),
    ] = "auto"
    mask: Annotated[
        str | None, Flag("A .npy file in the shape of one sample: True where the input may change.", "FILE")
    ] = None
    frozen: Annotated[
        tuple[str, ...], Flag("Features that do not change: names or numbers, separated by commas.", "NAMES")
    ] = ()
    samples: Annotated[int | None, Flag("Only the first so many samples.", "COUNT")] = None
    seed: Annotated[int, Flag("Same seed, same numbers (default 0).", "NUMBER")] = 0
    device: Annotated[str | None, Flag("cpu (default), cuda, cuda:1, ...", "DEVICE")] = None
    out: Annotated[str, Flag("The folder of the report (default rai-report).", "FOLDER")] = "rai-report"
    resume: Annotated[bool, Flag("Go on with the unfinished run in the folder.", spellings="--resume")] = False
    overwrite: Annotated[bool, Flag("Throw away the unfinished run in the folder.", spellings="--overwrite")] = False
    time_limit: Annotated[
        float | None, Flag("Seconds, after which the report is written with what is there.", "SECONDS")
    ] = None
    diagnostics: Annotated[
        bool, Flag("Whether to check the evaluation itself.", spellings="--diagnostics/--no-diagnostics")
    ] = True
    adaptive: Annotated[
        bool,
        Flag(
            "Whether to attack without the gradient too, where a check doubts it.", spellings="--adaptive/--no-adaptive"
        ),
    ] = True
    queries: Annotated[
        int,
        Flag("How often a model without a gradient is asked per sample and norm, at most (default 5000).", "COUNT"),
    ] = 5000
    draws: Annotated[
        int, Flag("Of a random model: how many answers are averaged and vote on a decision (default 1).", "COUNT")
    ] = 1
    average: Annotated[
        int, Flag("Random points per sample and epsilon, for the average (default 1; 0: none).", "COUNT")
    ] = 1
    corruption: Annotated[
        tuple[str, ...], Flag("file.py:function of (x, severity), which returns the corrupted batch.", "FUNCTION")
    ] = ()
    severities: Annotated[str, Flag("Of the corruptions (default 1,2,3,4,5); a forward pass each.", "NUMBERS")] = (
        "1,2,3,4,5"
    )
    keep_points: Annotated[
        bool,
        Flag("Keep the perturbed inputs of all samples in examples.npz, for --also-try.", spellings="--keep-points"),
    ] = False
    also_try: Annotated[
        tuple[str, ...],
        Flag(
            "Also try the perturbed inputs of an earlier report, which kept those of all samples; repeatable.", "FOLDER"
        ),
    ] = ()
    strict: Annotated[
        bool, Flag("Exit with 3 if the checks distrust the figures or could not be made.", spellings="--strict")
    ] = False
    fail_under: Annotated[
        tuple[Threshold, ...],
        Flag("Exit with 1 if the accuracy is less: 0.6@l2:0.5.", "THRESHOLD", Threshold.parse),
    ] = ()
    junit: Annotated[str | None, Flag("Write thresholds and checks as a JUnit XML report, for CI systems.", "FILE")] = (
        None
    )
    log: Annotated[
        tuple[str, ...], Flag("mlflow: log figures, files and checks as a run of MLflow.", "WHERE", _log)
    ] = ()

    @classmethod
    def make(cls, flags: Mapping[str, Any], config: str | None = None) -> Job:
        """Return the job of a config file with flags on top; a flag that is None or empty was not given.

        Raises InputError if the file or a value of it cannot be used.
        """
        words: dict[str, Any] = {}
        if config is not None:
            for entry, value in read_config(Path(config)).items():
                name = entry.replace("-", "_")
                if name not in _OPTIONS:
                    raise InputError(f"{config!r} has an unknown entry {entry!r}{did_you_mean(name, list(_OPTIONS))}")
                words[name] = _from_config(name, f"{config!r}: {entry}", value)
        words |= {name: value for name, value in flags.items() if value is not None and value != []}
        return cls(**{name: _parsed(name, value) for name, value in words.items()})

    def to_config(self) -> dict[str, Any]:
        """Return the content of a config file that repeats this job: all that is not the default."""
        left_out = {"out", "resume", "overwrite"}
        changed = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in left_out}
        return {
            name.replace("_", "-"): [str(part) for part in value] if isinstance(value, tuple) else value
            for name, value in changed.items()
            if value != _OPTIONS[name].default
        }


@dataclass(frozen=True)
class _Option:
    """A field of `Job`: the type of one value, whether there are many, and the default."""

    kind: type
    many: bool
    default: Any
    flag: Flag


def _option(hint: Any, default: Any) -> _Option:
    hint, flag = get_args(hint)
    many = get_origin(hint) is tuple
    kind = hint if isinstance(hint, type) and not many else get_args(hint)[0]
    return _Option(kind if kind in (bool, int, float) else str, many, default, flag)


_OPTIONS = {
    entry.name: _option(hint, entry.default)
    for entry, hint in zip(fields(Job), get_type_hints(Job, include_extras=True).values(), strict=True)
}


def _parsed(name: str, value: Any) -> Any:
    option = _OPTIONS[name]
    if option.many and option.flag.separator is not None:
        words = [word for words in value for word in words.split(option.flag.separator)]
        return tuple(dict.fromkeys(map(option.flag.parse, words)))
    if option.many:
        return tuple(map(option.flag.parse, value))
    return option.flag.parse(value) if option.kind is str else value


def _from_config(name: str, where: str, value: Any) -> Any:
    """Return a value of a config file as the flag would have it."""
    option = _OPTIONS[name]
    values = value if isinstance(value, list) else [value]
    if name in ("epsilons", "bounds", "severities") and values and all(map(_is_number, values)):
        value = ",".join(repr(float(entry)) for entry in values)
        return [value] if option.many else value
    if option.many:
        if any(isinstance(entry, (dict, list)) for entry in values):
            raise InputError(f"{where} must be a list of plain values, got {reprlib.repr(value):.80}")
        return [str(entry) for entry in values]
    fits = _is_number(value) if option.kind is float else type(value) is option.kind
    if not fits:
        raise InputError(f"{where} must be {_KINDS[option.kind]}, got {reprlib.repr(value):.80}")
    return value


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float64 has room for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def typer_parameters() -> list[inspect.Parameter]:
    """Return the options as parameters of a typer command; one that is not given is None."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                list[str] | None if option.many else option.kind | None,
                typer.Option(
                    *filter(None, [option.flag.spellings]), metavar=option.flag.metavar, help=option.flag.help
                ),
            ],
        )
        for name, option in _OPTIONS.items()
    ]


def as_flags(message: str) -> str:
    """Return the message of an error with flags where it names arguments."""

    def flag(name: str, value: str | None) -> str:
        name = {"norms": "norm", "corruptions": "corruption"}.get(name, name)
        if name not in _OPTIONS:
            return name
        flag = name.replace("_", "-")
        return f"--no-{flag}" if value == "False" else f"--{flag}" + ("" if value in (None, "True") else f" {value}")

    return spelled(message, flag)
