"""Where figures go: JUnit XML and MLflow, read back by the tools that read them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.cli import main
from rai_toolbox.robustness import Evaluation
from rai_toolbox.robustness.command import _mlflow
from rai_toolbox.robustness.command._options import ExitCode

MODEL = """
import torch
def make():
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    return model
def noisy(x, severity):
    return x + 0.1 * severity * torch.randn_like(x)
"""
QUICK = ["--model", "net.py:make", "--data", "blobs.npz", "--steps", "3", "--restarts", "1", "--quiet"]
RADII = ["--epsilons", "0.25,0.5"]


@pytest.fixture
def place(tmp_path, monkeypatch, blobs):
    """A folder with a model and data, which is the current one."""
    x, y = blobs
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    np.savez("blobs.npz", x=x, y=y)
    return tmp_path


@pytest.fixture
def store(place, monkeypatch):
    """A store of MLflow in that folder; what is logged is asked of it."""
    pytest.importorskip("mlflow", reason="needs MLflow: pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (place / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "robustness")
    return place


def logged():
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("robustness")
    assert experiment is not None
    return client, client.search_runs([experiment.experiment_id])


def test_a_junit_file_has_a_case_for_each_threshold_and_each_check(place):
    junitparser = pytest.importorskip("junitparser", reason="needs junitparser, of the dev extra")
    code = main(["evaluate", *QUICK, "--fail-under", "0.9@l2:0.5", "--fail-under", "0.1@l2:0.25", "--junit", "r.xml"])
    assert code == ExitCode.BELOW_THRESHOLD
    result = Evaluation.load("rai-report")
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile("r.xml")}
    assert list(suites) == ["rai-toolbox.thresholds", "rai-toolbox.checks"]
    failing, met = suites["rai-toolbox.thresholds"]
    assert (failing.name, met.name) == ("0.9@l2:0.5", "0.1@l2:0.25")
    value = result.curves["l2"].at(0.5).value
    (failure,) = failing.result
    assert isinstance(failure, junitparser.Failure)
    assert failure.message == f"accuracy at l2:0.5 is {value:.4f}, below 0.9"
    assert "95 % interval" in failing.system_out
    assert "upper bound" in failing.system_out
    assert met.is_passed
    checks = {case.name: case for case in suites["rai-toolbox.checks"]}
    assert list(checks) == [finding.check for finding in result.findings]
    for finding in result.findings:
        case = checks[finding.check]
        assert case.is_passed == (finding.verdict in ("ok", "warning", "not conclusive"))
        assert case.is_skipped == (finding.verdict == "not run")
        assert finding.summary in case.system_out
        for name, entry in finding.evidence.items():
            assert f"{name.replace('_', ' ')}: {entry}" in case.system_out
    assert suites["rai-toolbox.checks"].tests == len(checks)
    assert {prop.name for prop in suites["rai-toolbox.checks"].properties()} >= {"model", "data", "complete", "trusted"}


def test_a_distrusted_check_fails_and_with_strict_one_that_could_not_be_made_is_an_error(place):
    junitparser = pytest.importorskip("junitparser", reason="needs junitparser, of the dev extra")
    from rai_toolbox.robustness import Finding
    from rai_toolbox.robustness.command._junit import junit_xml

    main(["evaluate", *QUICK, *RADII, "--no-diagnostics"])
    findings = (
        Finding("a", "A", "distrust", "It is\x00 <broken> & \ud800.", {"drop": 0.5}),
        Finding("b", "B", "not run", "No.", {"could_not_be_made": True}),
        Finding("c", "C", "not run", "It is for classification."),
    )
    result = Evaluation(**vars(Evaluation.load("rai-report")) | {"findings": findings})
    for strict in (False, True):
        Path("r.xml").write_text(junit_xml(result, (), strict=strict), "utf-8")
        first, second, third = [case for suite in junitparser.JUnitXml.fromfile("r.xml") for case in suite]
        assert isinstance(first.result[0], junitparser.Failure)
        assert "<broken> &" in first.system_out
        assert isinstance(second.result[0], junitparser.Error if strict else junitparser.Skipped)
        assert third.is_skipped


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--junit", "nowhere/r.xml"], "error: --junit 'nowhere/r.xml': the folder 'nowhere' cannot be written to"),
        (["--junit", "."], "error: --junit '.': expected the name of a file"),
        (["--log", "mlfow"], "error: --log must be mlflow, got 'mlfow'"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_before_anything_is_computed(place, capsys, words, said):
    assert main(["evaluate", *QUICK, *words]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith(said)
    assert not Path("rai-report").exists()


def test_a_run_of_mlflow_has_parameters_figures_by_step_files_and_checks(store, capsys):
    words = ["--norm", "l2,linf", *RADII, "--corruption", "net.py:noisy", "--severities", "1,3", "--log", "mlflow"]
    assert main(["evaluate", *QUICK[:-1], "--json", *words]) == ExitCode.OK
    printed = json.loads(capsys.readouterr().out)  # nothing but the results
    result = Evaluation.load("rai-report")
    client, (run,) = logged()
    assert run.info.status == "FINISHED"
    assert run.data.params["model"] == "net.py:make"
    assert run.data.params["steps"] == "3"
    assert run.data.params["data.fingerprint"] == printed["data"]["fingerprint"]
    for norm, curve in result.curves.items():
        for name, values in {
            "epsilon": [point.epsilon for point in curve.points],
            "accuracy": [point.value for point in curve.points],
            "accuracy_low": [point.low for point in curve.points],
            "average_error": [point.error for point in curve.average],
            "average_error_high": [point.high for point in curve.average],
        }.items():
            history = client.get_metric_history(run.info.run_id, f"{norm}/{name}")
            assert [(one.step, one.value) for one in sorted(history, key=lambda one: one.step)] == list(
                enumerate(values)
            )
    noisy = client.get_metric_history(run.info.run_id, "corruption/noisy/accuracy")
    assert sorted(one.value for one in noisy) == sorted(one.value for one in result.corruptions["noisy"].points)
    for finding in result.findings:
        assert run.data.tags[f"check.{finding.check}"] == finding.verdict
    assert run.data.tags["evidence.curves.NORM.points"] == "attack (upper bound)"
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "card.md", "results.json", "curve.csv", "config.toml"} <= files
    local = client.download_artifacts(run.info.run_id, "results.json", str(store))
    assert Path(local).read_bytes() == Path("rai-report/results.json").read_bytes()


@pytest.mark.slow
def test_without_a_server_mlflows_own_store_in_sqlite_is_used(store, monkeypatch):
    pytest.importorskip("alembic", reason="needs alembic: pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    # In a process of its own, as a user does it: the store's migrations log and warn as they like.
    command = [sys.executable, "-m", "rai_toolbox", "evaluate", *QUICK, *RADII, "--no-diagnostics", "--log", "mlflow"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    read = "from mlflow import MlflowClient as C; c = C(); e = c.get_experiment_by_name('robustness');" + (
        "print(c.search_runs([e.experiment_id])[0].data.metrics['l2/accuracy'])"
    )
    value = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    assert float(value.split()[-1]) == Evaluation.load("rai-report").curves["l2"].points[-1].value


@pytest.mark.parametrize("words", [[], ["--fail-under", "0.99@l2:0.5"]], ids=["alone", "below a threshold too"])
def test_a_server_that_is_away_loses_no_result(store, monkeypatch, capsys, words):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code = main(["evaluate", *QUICK, *RADII, "--no-diagnostics", "--log", "mlflow", "--junit", "r.xml", *words])
    assert code == (ExitCode.BELOW_THRESHOLD if words else ExitCode.NOT_LOGGED)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 + bool(words)
    assert said[-1].startswith("error: not logged to MLflow, ")
    assert said[-1].endswith("all results are in 'rai-report'")
    assert Evaluation.load("rai-report").complete
    assert not Path("rai-report/unfinished").exists()
    assert Path("r.xml").exists()


def test_without_mlflow_one_line_says_what_installs_it(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["evaluate", *QUICK, "--log", "mlflow"]) == ExitCode.BAD_INPUT
    assert (
        capsys.readouterr().err
        == "error: --log mlflow needs MLflow: in a clone of this project, pip install '.[mlflow]'\n"
    )
    assert not Path("rai-report").exists()


def test_the_environment_and_the_loggers_are_left_as_they_were(monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    before, level = dict(os.environ), logging.getLogger("mlflow").level
    with _mlflow._quiet():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "9"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"
    assert dict(os.environ) == before
    assert logging.getLogger("mlflow").level == level


def test_nothing_is_imported_that_was_not_asked_for(place):
    code = (
        "import sys; from rai_toolbox.cli import main; main(['evaluate', *sys.argv[1:]]);"
        "print(sorted({'mlflow', 'maite', 'junitparser', 'sqlalchemy'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, *QUICK, *RADII, "--no-diagnostics", "--junit", "r.xml"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
