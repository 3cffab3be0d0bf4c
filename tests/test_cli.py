"""The command: what it writes, what it says, and how it ends."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.cli import main

FILES = {"report.html", "curve.png", "curve.csv", "classes.csv", "samples.csv", "examples.npz", "results.json"}
FILES |= {"config.toml", "card.md"}

MODELS = """
import torch
from torch import nn

def plane():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    return net

def masked():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plane()
        def forward(self, x):
            return self.net((x * 4).round() / 4)
    return Rounded()

def line():
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, 0.0]]))
    return net

def broken():
    raise RuntimeError("no such weights")

def number():
    return 3

def interrupted():
    class Interrupts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = plane(), 0
        def forward(self, x):
            self.calls += 1
            if self.calls > 6:
                raise KeyboardInterrupt
            return self.net(x)
    return Interrupts()

def memory():
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = plane(), 0
        def forward(self, x):
            self.calls += 1
            if self.calls > 6:
                raise RuntimeError("out of memory")
            return self.net(x)
    return Full()

def slow():
    import time
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plane()
        def forward(self, x):
            time.sleep(0.05)
            return self.net(x)
    return Slow()

def shift(x):
    return x - 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with models.py and data.npz, as a user would stand in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("models.py").write_text(MODELS)
    x = np.linspace(-1, 1, 40, dtype=np.float32)
    x = np.stack([x, np.zeros_like(x)], axis=1)
    y = (x[:, 0] > 0).astype(np.int64)
    np.savez("data.npz", x=x, y=y)
    np.savez("values.npz", x=x, y=3 * x[:, 0])
    return tmp_path


def run(*words, quick=True):
    """Run `evaluate` on the half plane; later flags win over these."""
    given = list(words)
    for flag, value in (("--model", "models.py:plane"), ("--data", "data.npz"), ("--out", "out")):
        if flag not in given:
            given += [flag, value]
    if quick and "--steps" not in given:
        given += ["--steps", "5", "--restarts", "1"]
    return main(["evaluate", *given])


def error_of(capsys):
    captured = capsys.readouterr().err
    # what it costs may have been said before
    lines = [line for line in captured.splitlines() if line.strip() and not line.startswith("about 0:")]
    assert len(lines) == 1, captured
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured
    return lines[0]


def test_it_writes_every_file_and_prints_the_curve(place, capsys):
    assert run("--norm", "l2", "--norm", "linf") == 0
    assert {path.name for path in Path("out").iterdir()} == FILES
    printed = capsys.readouterr()
    assert "accuracy of models.py:plane under attack (l2)" in printed.out
    assert "(linf)" in printed.out
    assert "report: out/report.html" in printed.err


def test_nothing_is_fetched_from_the_network(place, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert run("--norm", "l2", "--norm", "linf") == 0
    assert run("--model", "digits", "--data", "digits", "--samples", "4", "--out", "digits-report") == 0
    assert main(["compare", "out", "out"]) == 0


def test_a_config_file_that_unfolds_to_gigabytes_is_one_line(place, capsys):
    for name in ("norm", "seed", "bounds", "epsilons"):
        lines = "".join(f"- &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 12))
        Path("job.yaml").write_text(f"{name}:\n- &l0 [1]\n{lines}")
        assert main(["evaluate", "--config", "job.yaml"]) == 2
        assert len(error_of(capsys)) < 300


def test_the_demo_command_falls_to_nothing_at_the_largest_epsilon(place):
    words = ["evaluate", "--model", "digits", "--data", "digits", "--samples", "40", "--steps", "20"]
    assert main([*words, "--restarts", "1", "--quiet", "--out", "out"]) == 0
    points = json.loads(Path("out/results.json").read_text())["curves"]["l2"]["points"]
    assert points[0]["value"] >= 0.9
    assert points[-1]["value"] <= 0.05


def test_json_alone_is_on_standard_output(place, capsys):
    assert run("--json", "--no-diagnostics") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("out/results.json").read_text())


def test_quiet_says_nothing(place, capsys):
    assert run("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_the_config_in_the_folder_repeats_the_run(place):
    assert run("--epsilons", "0.25,0.5", "--frozen", "1", "--seed", "3", "--no-diagnostics") == 0
    first = json.loads(Path("out/results.json").read_text())
    assert main(["evaluate", "--config", "out/config.toml", "--out", "again"]) == 0
    again = json.loads(Path("again/results.json").read_text())
    for part in ("curves", "samples", "settings", "data"):
        assert again[part] == first[part]


@pytest.mark.parametrize("kind", ["toml", "yaml"])
def test_a_config_file_does_what_the_flags_do_and_flags_come_first(place, kind):
    toml = 'model = "models.py:plane"\ndata = "data.npz"\nnorm = ["l2", "linf"]\nepsilons = [0.25, 0.5]\nseed = 1\n'
    yaml = "model: models.py:plane\ndata: data.npz\nnorm: [l2, linf]\nepsilons: [0.25, 0.5]\nseed: 1\n"
    Path(f"job.{kind}").write_text({"toml": toml, "yaml": yaml}[kind])
    words = ["--config", f"job.{kind}", "--seed", "2", "--steps", "5", "--restarts", "1", "--no-diagnostics"]
    assert main(["evaluate", *words, "--out", "out"]) == 0
    settings = json.loads(Path("out/results.json").read_text())["settings"]
    assert settings["norms"] == ["l2", "linf"]
    assert settings["epsilons"]["linf"] == [0.25, 0.5]
    assert settings["seed"] == 2


def test_a_threshold_decides_the_exit_code(place, capsys):
    assert run("--fail-under", "0.4@l2:0.5", "--no-diagnostics") == 0
    capsys.readouterr()
    assert run("--fail-under", "0.9@l2:0.5", "--no-diagnostics") == 1
    assert "error: accuracy at l2:0.5 is 0.5" in capsys.readouterr().err


def test_a_partial_run_meets_no_threshold_and_is_not_trusted(place, capsys, monkeypatch):
    from rai_toolbox.robustness.run._run import Run

    words = ["--batch-size", "4", "--time-limit", "100"]
    # Ten batches are looked at, and two of them searched: what was not tried must not count as standing.
    monkeypatch.setattr(Run, "_late", lambda self: self._at[0].startswith("Searching") and self._at[1] >= 2)
    assert run(*words, "--fail-under", "0@l2:0.5", "--out", "a") == 1
    assert "is not known to reach 0: the run is partial" in capsys.readouterr().err
    assert run(*words, "--strict", "--out", "b") == 3
    assert "the time limit ended the run before the checks" in capsys.readouterr().err
    assert not json.loads(Path("b/results.json").read_text())["complete"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert run("--strict", "--no-diagnostics") == 2
    assert "give one of the two" in error_of(capsys)


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(place, capsys, monkeypatch):
    from rai_toolbox.robustness.command import _console

    monkeypatch.setattr(_console, "_SECONDS_BETWEEN_LINES", 0.0)
    assert run("--batch-size", "10", "--no-diagnostics") == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        re.fullmatch(r"Searching the nearest errors \(l2\): 2 of 4, about 0:00:\d\d left", lines[1]) or len(lines) > 3
    )
    assert any(line.startswith("Trying each epsilon (l2): 4 of 4, about 0:00:00 left") for line in lines)
    assert run("--batch-size", "10", "--no-diagnostics", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_on_a_terminal_bars_show_what_is_left(place, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert run("--batch-size", "10", "--no-diagnostics") == 0
    shown = capsys.readouterr().err
    for stage in ("Looking at the model", "Searching the nearest errors (l2)", "Trying each epsilon (l2)"):
        assert stage in shown
    assert "left" in shown
    assert "100 %" in shown


def test_what_may_change_and_how_far_comes_from_files(place):
    np.save("mask.npy", np.array([True, False]))
    # The boundary of the classifier lies across x0 = 0: bounds that end before it are never crossed.
    with np.load("data.npz") as data:
        x = data["x"]
    np.savez("limits.npz", lower=np.array([-1.0, -0.1]), upper=np.array([1.0, 0.1]))
    assert run("--mask", "mask.npy", "--bounds", "limits.npz", "--epsilons", "0.5", "--no-diagnostics") == 0
    with np.load("out/examples.npz") as shown:
        assert (shown["l2_perturbed"][:, 1] == shown["l2_original"][:, 1]).all()
        assert (shown["l2_perturbed"][:, 0] != shown["l2_original"][:, 0]).all()
    bounds = json.loads(Path("out/results.json").read_text())["settings"]["bounds"]
    assert bounds["lower"] == [-1.0, pytest.approx(-0.1)]
    assert bounds["frozen_features"] == 1
    np.save("mask.npy", np.array([False, True]))
    assert run("--mask", "mask.npy", "--epsilons", "0.5", "--no-diagnostics", "--out", "other") == 0
    points = json.loads(Path("other/results.json").read_text())["curves"]["l2"]["points"]
    assert [point["value"] for point in points] == [1.0, 1.0]
    np.savez("limits.npz", lower=np.array([x[20, 0] / 2, -1.0]), upper=np.array([1.0, 1.0]))
    np.savez("data.npz", x=x[20:], y=np.ones(20, dtype=int))
    assert run("--bounds", "limits.npz", "--epsilons", "3", "--no-diagnostics", "--out", "third") == 0
    points = json.loads(Path("third/results.json").read_text())["curves"]["l2"]["points"]
    assert [point["value"] for point in points] == [1.0, 1.0]


def test_strict_exits_with_3_where_the_checks_fail_and_only_there(place, capsys):
    assert run("--strict") == 0
    assert run("--model", "models.py:masked") == 0
    assert "do not trust" in capsys.readouterr().err
    assert run("--model", "models.py:masked", "--strict") == 3
    assert "error: the checks say not to trust the figures (" in capsys.readouterr().err


def test_strict_does_not_pass_where_checks_have_nothing_to_look_at(place, capsys):
    with np.load("data.npz") as data:
        np.savez("data.npz", x=data["x"], y=1 - data["y"])
    assert run("--strict") == 3
    said = capsys.readouterr().err
    assert "checks could not be made, and count as failed with --strict (" in said
    assert "The order of the labels" in said


def test_the_bounds_that_were_applied_are_printed(place, capsys):
    assert run("--no-diagnostics") == 0
    assert "bounds (from the data): none" in capsys.readouterr().out
    assert run("--no-diagnostics", "--bounds", "-2,2", "--overwrite") == 0
    assert "bounds (given): -2 to 2" in capsys.readouterr().out


def test_regression_runs(place, capsys):
    assert run("--model", "models.py:line", "--data", "values.npz", "--task", "regression", "--epsilons", "0.5") == 0
    points = json.loads(Path("out/results.json").read_text())["curves"]["l2"]["points"]
    assert points[1]["value"] == pytest.approx(1.5, rel=1e-3)
    assert "mean absolute error" in capsys.readouterr().out


def test_ctrl_c_leaves_no_half_written_file_and_can_be_gone_on_from(place, capsys):
    assert run("--model", "models.py:interrupted", "--batch-size", "10") == 130
    assert "--resume" in error_of(capsys)
    assert {path.name for path in Path("out").iterdir()} == {"unfinished"}
    assert not list(Path("out").rglob(".partial-*"))


def test_ctrl_c_from_outside_ends_it_with_130_and_one_line(place):
    words = [sys.executable, "-m", "rai_toolbox", "evaluate", "--model", "models.py:slow", "--data", "data.npz"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell has its background jobs ignore it
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    words += ["--out", "out", "--batch-size", "10"]
    process = subprocess.Popen(words, env=environment, preexec_fn=heeds, **options)
    deadline = time.monotonic() + 120
    while not list(Path("out").glob("unfinished/*.npz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert out == ""
    assert message.endswith("error: interrupted; finished batches are kept, run again with --resume\n")
    assert {path.name for path in Path("out").iterdir()} == {"unfinished"}


def test_a_model_that_fails_in_the_middle_is_told_in_one_line(place, capsys):
    assert run("--model", "models.py:memory") == 4
    assert "lower --batch-size" in error_of(capsys)


def test_compare_is_a_command(place, capsys):
    assert run("--out", "a", "--no-diagnostics") == 0
    assert run("--out", "b", "--no-diagnostics", "--steps", "7") == 0
    assert main(["compare", "a", "b", "--out", "both"]) == 0
    kinds = ("html", "png", "csv", "json")
    assert {path.name for path in Path("both").iterdir()} == {f"comparison.{kind}" for kind in kinds}
    capsys.readouterr()
    assert main(["compare", "a", "b", "a/results.json", "--out", "three"]) == 0
    head, *table = capsys.readouterr().out.splitlines()
    assert head == "accuracy under attack (l2); samples that only a : only the other gets right, p-value"
    assert "a/results.json" in " ".join(table)
    assert main(["compare", "a", "nowhere"]) == 2
    assert "cannot read" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "missing.npz"], "there is no file or folder 'missing.npz'"),
        (["--model", "missing.pt2"], "there is no file 'missing.pt2'"),
        (["--model", "models.py:plain"], "has no function 'plain'; did you mean 'plane'"),
        (["--model", "nothere.py:plane"], "there is no file 'nothere.py'"),
        (["--model", "no.such.module:f"], "there is no module 'no.such.module'"),
        (["--model", "models.py:broken"], "raised RuntimeError: no such weights"),
        (["--model", "models.py:number"], "expected an nn.Module"),
        (["--model", "models.py"], "name the function in it"),
        (["--model", "digits"], "the model cannot take a batch of shape (2, 2)"),
        (["--epsilons", "-1"], "not negative, got -1"),
        (["--epsilons", "a,b"], "expected numbers separated by commas"),
        (["--epsilons", "linf:1"], "give --norm linf too"),
        (["--norm", "l3"], "norm must be one of"),
        (["--bounds", "0,0.5"], "outside the bounds 0,0.5"),
        (["--bounds", "1"], "expected LOWER,UPPER"),
        (["--mask", "data.npz"], "expected a .npy file"),
        (["--frozen", "7"], "there is no feature '7'"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--device", "nope"], "--device 'nope' cannot be used"),
        (["--fail-under", "0.5"], "expected ACCURACY@NORM:EPSILON"),
        (["--fail-under", "0.5@linf:1"], "give --norm linf too"),
        (["--preprocess", "normalize:0"], "expected normalize:MEAN/STD"),
        (["--weights", "missing.pt"], "there is no file 'missing.pt'"),
        (["--label-column", "z"], "is none"),
        (["--config", "missing.toml"], "cannot read 'missing.toml'"),
        (["--steps", "many"], "steps"),
        (["--stepz", "3"], "--stepz"),
        (["--out", "data.npz"], "there is a file of that name"),
        (["--out", "data.npz/deeper"], "cannot be"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(place, capsys, words, said):
    assert run(*words) == 2
    assert said in error_of(capsys)
    assert not Path("out/results.json").exists()


def test_an_output_folder_that_cannot_be_written_to_is_refused(place, capsys, monkeypatch):
    import tempfile

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert run() == 2
    assert "cannot be written to: Permission denied" in error_of(capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "cannot be parsed"),
        ("modle = 'digits'", "unknown entry 'modle'; did you mean 'model'?"),
        ("seed = 'one'", "must be a whole number"),
        ("strict = 1", "must be true or false"),
        ("norm = [[1]]", "plain values"),
    ],
)
def test_bad_config_files_get_one_line_and_exit_code_2(place, capsys, text, said):
    Path("job.toml").write_text(text)
    assert main(["evaluate", "--config", "job.toml"]) == 2
    assert said in error_of(capsys)


def test_nothing_given_says_what_to_give(place, capsys):
    assert main(["evaluate"]) == 2
    assert "rai-toolbox evaluate --model digits --data digits" in error_of(capsys)
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Commands:\n  evaluate  Measure accuracy" in shown.out
    assert shown.out.endswith("To begin: rai-toolbox evaluate --model digits --data digits\n")


def test_version_and_help(place, capsys):
    from rai_toolbox import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main(["evaluate", "--help"]) == 0
    assert "--fail-under" in capsys.readouterr().out


def test_it_is_a_module_too_and_needs_no_picture_library_to_be_imported(place):
    code = (
        "import sys, rai_toolbox.robustness;"
        "print(sorted({'matplotlib', 'typer', 'rich', 'jinja2', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.strip() == "[]"
    words = [sys.executable, "-m", "rai_toolbox", "evaluate", "--model", "x"]
    shown = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: --data must be given")
