"""The command `rai-toolbox`: from words to calls."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from inspect import Signature, signature
from typing import Annotated, Any

from rai_toolbox._extras import install_command

try:
    import numpy  # noqa: F401
    import rich  # noqa: F401
    import typer
except ImportError:
    sys.exit(f"error: the command needs more than the library: {install_command('cli')}")

from rai_toolbox._version import __version__
from rai_toolbox.robustness import EvaluationFailed, InputError
from rai_toolbox.robustness import compare as compare_evaluations
from rai_toolbox.robustness.command import _console
from rai_toolbox.robustness.command._job import evaluated_model, run_job
from rai_toolbox.robustness.command._options import ExitCode, Job, as_flags, typer_parameters

__all__ = ["app", "main"]

app = typer.Typer(
    name="rai-toolbox",
    help="Measure how robust a model is.",
    add_completion=True,
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


def _evaluate(*, config: str | None, json: bool, quiet: bool, **flags: Any) -> None:
    """Measure accuracy (or error) against the size of the worst change of the input, and write a report.

    To see what comes out: rai-toolbox evaluate --model digits --data digits
    """
    job = Job.make(flags, config)
    try:
        with _console.progress(shown=not quiet) as progress:
            outcome = run_job(job, progress)
    except KeyboardInterrupt:
        raise _Interrupted from None
    if outcome.leads:
        # Who reads only the first lines still gets the exit code of the run.
        with contextlib.suppress(BrokenPipeError):
            _console.report(outcome, as_json=json, quiet=quiet)
            sys.stdout.flush()
    raise typer.Exit(outcome.exit_code)


def _about_the_command(
    *,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A TOML or YAML file with any of these flags; flags given here come first."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Declare the options that decide no figure."""


# typer reads a command's options from its signature.
_OWN = signature(_about_the_command, eval_str=True).parameters.values()
vars(_evaluate)["__signature__"] = Signature([*typer_parameters(), *_OWN])
app.command("evaluate")(_evaluate)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="The folder, or results.json, of one evaluation.")],
    second: Annotated[str, typer.Argument(help="Of another, on the same samples.")],
    others: Annotated[list[str] | None, typer.Argument(help="Of more, each compared with the first.")] = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder of the comparison.")] = "rai-comparison",
    transfer: Annotated[
        bool,
        typer.Option(
            "--transfer", help="Load the models by config.toml in each folder; try the errors of each on each."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print comparison.json instead of a table.")] = False,
) -> None:
    """Compare evaluated classifiers: all curves in one picture, McNemar's test of each with the first."""
    places = first, second, *(others or ())
    comparison = compare_evaluations(*places, models=[evaluated_model(one) for one in places] if transfer else None)
    _console.report_comparison(comparison, comparison.save(out), as_json=json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: see `ExitCode`.

    Whatever the user gave wrong is one line on standard error, never a traceback.
    """
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may have letters that the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    code = _main(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_printing()
    except OSError as error:
        _stop_printing()
        return _fail(f"standard output cannot be written: {error.strerror or error}", ExitCode.FAILED)
    return code


def _main(arguments: list[str] | None) -> int:
    try:
        result = app(args=arguments, standalone_mode=False)
    except InputError as error:
        # Every process of torchrun was given the same; one says so.
        return _fail(as_flags(error.message), ExitCode.BAD_INPUT, ranks=("0",))
    except EvaluationFailed as error:
        return _fail(as_flags(error.message), ExitCode.FAILED)
    except _Interrupted:
        return _fail("interrupted; finished batches are kept, run again with --resume", ExitCode.INTERRUPTED)
    except _Terminated:
        # torchrun names the process that died, but not the remedy. Two processes print it: one of them may be dead.
        message = "terminated from outside, or because another process died; finished batches are kept, run again with"
        return _fail(f"{message} --resume", ExitCode.TERMINATED, ranks=("0", "1"))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        _stop_printing()
        return 0
    except SystemExit as error:
        return _fail(
            f"the model, or the module it comes from, ended the program: SystemExit {error.code!r:.200}",
            ExitCode.FAILED,
        )
    except OSError as error:
        where = f"{error.filename!r}" if error.filename else "standard output"
        return _fail(f"{where} cannot be written: {error.strerror or error}", ExitCode.FAILED)
    except Exception as error:
        # Wrong flags; the class is click's or typer's own, by their versions.
        if not hasattr(error, "format_message"):
            return _fail(_unexpected(error), ExitCode.FAILED)
        return _fail(error.format_message(), ExitCode.BAD_INPUT)  # type: ignore[attr-defined]
    return int(result) if isinstance(result, int) else 0


def _unexpected(error: Exception) -> str:
    """Write the traceback of an error that nobody foresaw to a file, and return a sentence that names it."""
    said = " ".join(str(error).split())[:200]
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="rai-toolbox-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return f"this should not have happened: {type(error).__name__}: {said}"
    return f"this should not have happened: {type(error).__name__}: {said}; the traceback is in {file.name!r}"


def _fail(message: str, code: ExitCode, *, ranks: tuple[str, ...] | None = None) -> int:
    """Print the error, in the processes of these ranks or in all, and return the exit code."""
    if ranks is None or os.environ.get("RANK", "0") in ranks:
        with contextlib.suppress(OSError):
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return int(code)


def _stop_printing() -> None:
    """Let nothing more be written to standard output: what is left in its buffer would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(*_: object) -> None:
    raise _Terminated
