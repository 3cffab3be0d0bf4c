"""Options are defined once; the library's errors name arguments and the command's name flags."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rai_toolbox.cli import main
from rai_toolbox.robustness import EvaluationFailed, InputError, evaluate, load_model
from rai_toolbox.robustness._errors import arg
from rai_toolbox.robustness.command._config import to_toml
from rai_toolbox.robustness.command._options import ExitCode, Job, Radii, Threshold, as_flags, typer_parameters


def test_the_library_names_arguments() -> None:
    with pytest.raises(InputError, match=r"^weights goes with") as caught:
        load_model("model.pt2", weights="w.pt")
    assert caught.value.argument == "weights"
    assert "--" not in str(caught.value)
    with pytest.raises(InputError, match=r"^steps must be a whole number, at least 1, got 0$"):
        evaluate(lambda x: x, ([[1.0]], [0]), steps=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--weights", "w.pt", "--model", "m.pt2"],
            "error: --weights goes with a function that builds the model: --model",
        ),
        (["--steps", "0"], "error: --steps must be a whole number, at least 1, got 0"),
        (["--batch-size", "0"], "error: --batch-size must be a whole number"),
        (["--norm", "l3"], "error: --norm must be one of"),
        (["--time-limit", "-1"], "error: --time-limit must be a number of seconds"),
    ],
)
def test_the_command_names_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(1, 2)\n")
    Path("data.csv").write_text("a,label\n0,0\n1,1\n")
    assert main(["evaluate", "--model", "net.py:make", "--data", "data.csv", *words]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("kind", [InputError, EvaluationFailed])
def test_an_error_keeps_its_argument_between_processes(kind: type[InputError]) -> None:
    error = pickle.loads(
        pickle.dumps(kind(f"go on with {arg('resume', True)}, {arg('task', 'regression')} or {arg('x')}"))
    )
    assert str(error) == "go on with resume=True, task='regression' or x"
    assert error.argument == "resume"
    assert as_flags(error.message) == "go on with --resume, --task regression or x"


def test_every_option_of_a_run_is_an_argument_of_evaluate_or_made_into_one() -> None:
    # The others say what to load, or what the command does with the result.
    loads = {"model", "data", "weights", "label_column", "samples"}
    decides = {"out", "strict", "fail_under", "junit", "log"}
    made = {"norm": "norms", "frozen": "mask", "corruption": "corruptions"}
    names = {made.get(entry.name, entry.name) for entry in fields(Job)} - loads - decides
    assert names <= set(inspect.signature(evaluate).parameters)
    assert [parameter.name for parameter in typer_parameters()] == [entry.name for entry in fields(Job)]


numbers = st.floats(1e-6, 1e6)


@given(
    epsilons=st.lists(st.tuples(st.sampled_from(["", "l2:", "linf:"]), st.lists(numbers, min_size=1, max_size=3))),
    fail_under=st.lists(st.tuples(st.floats(0, 1), numbers), max_size=2),
    steps=st.none() | st.integers(1, 10**6),
    strict=st.booleans(),
    model=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
)
def test_a_job_written_as_a_config_file_is_read_as_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, epsilons, fail_under, steps, strict, model
) -> None:
    words = {
        "model": model,
        "epsilons": [norm + ",".join(map(repr, values)) for norm, values in epsilons],
        "fail_under": [f"{least!r}@l2:{radius!r}" for least, radius in fail_under],
        "steps": steps,
        "strict": strict,
    }
    job = Job.make(words)
    path = tmp_path_factory.mktemp("job") / "config.toml"
    path.write_text(to_toml(job.to_config()), "utf-8")
    assert Job.make({}, str(path)) == job
    assert job.epsilons == tuple(map(Radii.parse, words["epsilons"]))
    assert job.fail_under == tuple(map(Threshold.parse, words["fail_under"]))
