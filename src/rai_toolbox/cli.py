"""The command `rai-toolbox`: from words to calls."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

try:
    import numpy  # noqa: F401
    import rich  # noqa: F401
    import typer
except ImportError:
    sys.exit("error: the command needs more than the library: pip install 'rai-toolbox[cli]'")

from rai_toolbox._version import __version__
from rai_toolbox.robustness import EvaluationFailed, InputError
from rai_toolbox.robustness import compare as compare_evaluations
from rai_toolbox.robustness.command import _console, _job

__all__ = ["app", "main"]

app = typer.Typer(
    name="rai-toolbox",
    help="Measure how robust a model is.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class _Terminated(BaseException):
    """SIGTERM, from a scheduler, or from torchrun after another process has died; no model's `except` may stop it."""


class _Interrupted(Exception):
    """Ctrl-C in the middle of an evaluation; typer has ways of its own with KeyboardInterrupt."""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        typer.echo("\nTo begin: rai-toolbox evaluate --model digits --data digits")
    else:
        return
    raise typer.Exit


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="digits, file.py:function, package.module:function, or a .pt2, TorchScript or ONNX file.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="digits, an .npz file with x and y, a .csv or .parquet"
            " table, a folder of images per class, or file.py:function.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A state dict (.safetensors, or of torch.save) to load into the model."),
    ] = None,
    preprocess: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="normalize:MEAN/STD or file.py:function of a batch; epsilon stays in the data's units."
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column of a table with the label; label, target, class or y is found without."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="classification (default) or regression.")] = None,
    norm: Annotated[
        list[str] | None, typer.Option(metavar="NORM", help="l2 (default), linf, l1 or l0; several by giving it again.")
    ] = None,
    epsilons: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Radii to report: 0.25,0.5,1 or, for one norm, l2:0.5,1. Default: a grid that fits the data.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="COUNT", help="Steps of each run of a solver (default 50)."),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", help="Runs of a solver per sample, from different points (default 18; 5 at each epsilon)."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="COUNT", help="Samples at a time (default 128).")] = None,
    bounds: Annotated[
        str | None,
        typer.Option(
            metavar="BOUNDS",
            help="LOWER,UPPER, an .npz file with lower and upper, none, or auto (default): images stay images.",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A .npy file in the shape of one sample: True where the input may change."),
    ] = None,
    frozen: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Features that do not change: names or numbers, separated by commas."),
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="COUNT", help="Only the first so many samples.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="Same seed, same numbers (default 0).")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu (default), cuda, cuda:1, ...")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The folder of the report (default rai-report).")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A TOML or YAML file with any of these flags; flags given here come first."),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with the unfinished run in the folder.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Throw away the unfinished run in the folder.")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Seconds, after which the report is written with what is there."),
    ] = None,
    diagnostics: Annotated[
        bool | None, typer.Option("--diagnostics/--no-diagnostics", help="Whether to check the evaluation itself.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Exit with 3 if the checks say not to trust the figures.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="THRESHOLD", help="Exit with 1 if the accuracy is less: 0.6@l2:0.5.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Measure accuracy (or error) against the size of the worst change of the input, and write a report.

    To see what comes out: rai-toolbox evaluate --model digits --data digits
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "json", "quiet")}
    job = _job.Job.make(flags, config)
    try:
        with _console.progress(shown=not quiet) as progress:
            outcome = _job.run_job(job, progress)
    except KeyboardInterrupt:
        raise _Interrupted from None
    if outcome.leads:
        _console.report(outcome, as_json=json, quiet=quiet)
    raise typer.Exit(outcome.exit_code)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="The folder, or results.json, of one evaluation.")],
    second: Annotated[str, typer.Argument(help="Of another, on the same samples.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder of the comparison.")] = "rai-comparison",
    json: Annotated[bool, typer.Option("--json", help="Print comparison.json instead of a table.")] = False,
) -> None:
    """Compare two evaluated classifiers: both curves in one picture, McNemar's test at each epsilon."""
    comparison = compare_evaluations(first, second)
    _console.report_comparison(comparison, comparison.save(out), as_json=json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: see EXIT of the jobs.

    Whatever the user gave wrong is one line on standard error, never a traceback.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(args=arguments, standalone_mode=False)
    except InputError as error:
        # Every process of torchrun was given the same; one says so.
        return _fail(str(error), 2) if os.environ.get("RANK", "0") == "0" else 2
    except EvaluationFailed as error:
        return _fail(str(error), 4)
    except _Interrupted:
        return _fail("interrupted; finished batches are kept, run again with --resume", 130)
    except _Terminated:
        # torchrun says which process died, in many lines, but not what to do. Two speak: one of them may be the dead.
        message = "terminated from outside, or because another process died; finished batches are kept, run again with"
        return _fail(f"{message} --resume", 143) if os.environ.get("RANK", "0") in ("0", "1") else 143
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 0
    except Exception as error:
        # Wrong flags; the class is click's or typer's own, by their versions.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _terminated(*_: object) -> None:
    raise _Terminated
