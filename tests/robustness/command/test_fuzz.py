"""A thousand malformed inputs: one clear line and exit code 2 for each, never a traceback, never a partial report."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rai_toolbox.cli import main

pytestmark = pytest.mark.slow

MODEL = "from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n"
FUZZ = settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("fuzz"))
    Path("model.py").write_text(MODEL)
    np.savez("good.npz", x=np.zeros((4, 2), np.float32), y=np.zeros(4, int))
    yield
    patch.undo()


def refused(capsys, *words):
    """Run the command on what is wrong with it; a run that is right after all must be whole."""
    shutil.rmtree("out", ignore_errors=True)
    quick = ["--steps", "1", "--restarts", "1", "--no-diagnostics", "--quiet", "--overwrite"]
    capsys.readouterr()
    code = main(["evaluate", "--out", "out", *quick, *words])
    said = capsys.readouterr().err
    if code in (0, 1):
        assert Path("out/results.json").exists()
        return
    assert code == 2, said
    lines = said.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert "Traceback" not in said
    assert not any(path.suffix in (".html", ".json", ".png", ".csv") for path in Path("out").glob("*"))


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


GOOD = archive(x=np.arange(8, dtype=np.float32).reshape(4, 2), y=np.array([0, 1, 0, 1]))


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=12).map(
            lambda edits: bytes(dict(edits).get(i, byte) for i, byte in enumerate(GOOD))
        ),
        st.integers(0, len(GOOD)).map(lambda cut: GOOD[:cut]),
    )
)
def test_damaged_archives(capsys, content):
    Path("bad.npz").write_bytes(content)
    refused(capsys, "--model", "model.py:make", "--data", "bad.npz")


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
KINDS = st.sampled_from(["f4", "f8", "i8", "u1", "U3", "S2", "c8", "M8[s]", "b1"])


@FUZZ
@given(SHAPES, KINDS, SHAPES, KINDS, st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, 1e30]))
def test_archives_of_wrong_arrays(capsys, x_shape, x_kind, y_shape, y_kind, value):
    def filled(shape, kind):
        array = np.zeros(shape, np.dtype(kind))
        if array.dtype.kind == "f":
            array.fill(value)
        return array

    Path("bad.npz").write_bytes(archive(x=filled(x_shape, x_kind), y=filled(y_shape, y_kind)))
    refused(capsys, "--model", "model.py:make", "--data", "bad.npz")


CELLS = st.one_of(
    st.sampled_from(["1", "", "0.5", "nan", "inf", "x", '"', "1e999", "label", "é", "\0"]), st.text(max_size=4)
)


@FUZZ
@given(st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6).map("\n".join), st.booleans())
def test_malformed_tables(capsys, text, headed):
    header = "a,b,label\n" if headed else ""
    Path("bad.csv").write_bytes((header + text).encode("utf-8", "surrogatepass"))
    refused(capsys, "--model", "model.py:make", "--data", "bad.csv")


VALUES = st.recursive(
    st.one_of(st.integers(-5, 5), st.floats(allow_nan=True), st.booleans(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["norm", "epsilons", "bounds", "seed", "task", "mask", "samples", "fail-under", "frozen", "device"]
)


@FUZZ
@given(
    st.one_of(st.text(max_size=80), st.dictionaries(NAMES, VALUES, min_size=1, max_size=3)),
    st.sampled_from(["toml", "yaml"]),
)
def test_malformed_config_files(capsys, content, kind):
    import yaml

    if not isinstance(content, str):
        kind, content = "yaml", yaml.safe_dump(content, allow_unicode=True)
    Path(f"bad.{kind}").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(capsys, "--model", "model.py:make", "--data", "good.npz", "--config", f"bad.{kind}")


WORDS = st.one_of(st.text(max_size=8), st.from_regex(r"-?[0-9.,:@e]{1,6}", fullmatch=True))
FLAGS = st.one_of(
    st.sampled_from(["norm", "epsilons", "bounds", "seed", "task", "mask", "samples", "fail-under", "frozen"]),
    st.sampled_from(["device", "preprocess", "weights", "label-column", "batch-size", "time-limit", "model", "data"]),
)


@FUZZ
@given(
    st.lists(
        st.tuples(FLAGS, st.one_of(st.text(max_size=8), st.from_regex(r"-?[0-9.,:@e]{1,6}", fullmatch=True))),
        min_size=1,
        max_size=2,
    )
)
def test_malformed_flags(capsys, given_flags):
    words = [f"--{flag}={value}" for flag, value in given_flags]
    refused(capsys, "--model", "model.py:make", "--data", "good.npz", *words)
