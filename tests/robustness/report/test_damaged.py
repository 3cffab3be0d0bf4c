"""results.json that has been damaged: one line that says where, from `compare` and `Evaluation.load` alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.cli import main
from rai_toolbox.robustness import Evaluation, InputError, evaluate

QUICK = {"steps": 3, "restarts": 1, "diagnostics": False}


def same(x, severity):
    return x


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The folder and the content of a sound result."""
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    result = evaluate(
        lambda v: 3 * v, (x, (x[:, 0] > 0).astype(int)), epsilons=[0.25, 0.5], corruptions={"same": same}, **QUICK
    )
    folder = result.save(tmp_path_factory.mktemp("sound"))
    return folder, json.loads((folder / "results.json").read_text())


def curve(content):
    return content["curves"]["l2"]


def samples(content):
    return content["samples"]


DAMAGES = {
    "a list shorter than the samples": lambda c: samples(c)["label"].pop(),
    "a prediction too many": lambda c: samples(c)["prediction"].append(0),
    "distances shorter": lambda c: samples(c)["distance"]["l2"].pop(),
    "distances of another norm": lambda c: samples(c).update(distance={"linf": samples(c)["distance"]["l2"]}),
    "no distances": lambda c: samples(c).pop("distance"),
    "no correct": lambda c: samples(c).pop("correct"),
    "correct in words": lambda c: samples(c).update(correct=["yes"] * 12),
    "settings null": lambda c: c.update(settings=None),
    "settings without bounds": lambda c: c["settings"].pop("bounds"),
    "points empty": lambda c: curve(c).update(points=[]),
    "points missing": lambda c: curve(c).pop("points"),
    "a radius null": lambda c: curve(c)["points"][1].update(epsilon=None),
    "a radius in words": lambda c: curve(c)["points"][1].update(epsilon="0.25"),
    "a negative radius": lambda c: curve(c)["points"][1].update(epsilon=-0.25),
    "radii out of order": lambda c: curve(c)["points"].reverse(),
    "an accuracy above 1": lambda c: curve(c)["points"][1].update(value=1.5),
    "an accuracy null": lambda c: curve(c)["points"][1].update(value=None),
    "an average of other radii": lambda c: curve(c)["average"].pop(),
    "an average error above 1": lambda c: curve(c)["average"][1].update(error=1.5),
    "an average in words": lambda c: curve(c)["average"][1].update(points="12"),
    "attacks shorter": lambda c: samples(c)["found_by"]["l2"].pop(),
    "attacks by radius": lambda c: samples(c).update(found_by={"l2": [["worst_case"]] * 12}),
    "ids shorter": lambda c: samples(c).update(id=["a"]),
    "a corruption of another name": lambda c: c["corruptions"]["same"].update(name="other"),
    "a corruption without points": lambda c: c["corruptions"]["same"].update(points=[]),
    "a corruption's accuracy above 1": lambda c: c["corruptions"]["same"]["points"][0].update(value=2),
    "2-d distances": lambda c: samples(c)["distance"].update(l2=[[v] for v in samples(c)["distance"]["l2"]]),
    "complete in words": lambda c: c.update(complete="no"),
    "complete a number": lambda c: c.update(complete=1),
    "negative distances": lambda c: samples(c)["distance"]["l2"].__setitem__(3, -0.5),
    "not measured, and complete": lambda c: samples(c)["distance"]["l2"].__setitem__(3, -1.0),
    "another task": lambda c: c.update(task="segmentation"),
    "regression": lambda c: c.update(task="regression"),
    "curves a list": lambda c: c.update(curves=[]),
    "no curves": lambda c: c.update(curves={}),
    "an unknown norm": lambda c: c["curves"].update(l7=curve(c)),
    "a curve of another norm": lambda c: curve(c).update(norm="linf"),
    "a class shorter": lambda c: curve(c)["classes"][0]["values"].pop(),
    "no fingerprint": lambda c: c["data"].pop("fingerprint"),
    "the shape in words": lambda c: c["data"].update(shape="1"),
    "class names null": lambda c: c.update(class_names=None),
    "a class name a number": lambda c: c.update(class_names=[1, 2]),
    "timings null": lambda c: c.update(timings=None),
    "findings that are none": lambda c: c.update(findings=["fine"]),
    "a verdict of its own": lambda c: c.update(
        findings=[{"check": "a", "title": "b", "verdict": "fine", "summary": "c", "evidence": {}}]
    ),
    "an index of 400 digits": lambda c: samples(c)["index"].__setitem__(0, 10**400),
    "no samples": lambda c: [samples(c)[name].clear() for name in ("index", "label", "prediction", "correct")]
    + [samples(c)["distance"]["l2"].clear()],
    "samples null": lambda c: c.update(samples=None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_told_in_one_line(sound, tmp_path, capsys, damage):
    folder, content = sound
    content = copy.deepcopy(content)
    damage(content)
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged: "):
        Evaluation.load(tmp_path)
    assert main(["compare", str(folder), str(tmp_path), "--out", str(tmp_path / "both")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 700
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    "text", ['{"schema": NaN}', "[" * 10**5, "\ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe"]
)
def test_what_is_no_json_is_told_in_one_line(tmp_path, text):
    (tmp_path / "results.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match="is not JSON"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_file_of_the_older_version_is_read(task, tmp_path):
    older = Path(__file__).with_name("older") / f"{task}-1.json"
    content = json.loads(older.read_text())
    assert content["schema_version"] == 1
    result = Evaluation.load(older)
    for norm, curve in content["curves"].items():
        expected = [point | {"also_by_earlier_points": 0} for point in curve["points"]]
        assert [vars(point) for point in result.curves[norm].points] == expected
        assert result.curves[norm].average == ()
    assert result.corruptions == {}
    assert result.ids is None
    assert [evidence.kind for evidence in result.evidence] == ["attack"]
    result.save(tmp_path)  # every file can be made of it
    newer = json.loads((tmp_path / "results.json").read_text())
    assert newer["schema_version"] == 3
    assert newer["findings"] == content["diagnostics"]
    assert "diagnostics" not in newer
    assert newer["samples"] == content["samples"] | {"id": None}
    assert Evaluation.load(tmp_path).to_json() == result.to_json()
    if task == "classification":
        assert main(["compare", str(older), str(tmp_path), "--out", str(tmp_path / "both")]) == 0


def test_findings_that_version_2_called_diagnostics_are_read(half_plane, blobs, tmp_path):
    result = evaluate(half_plane, blobs, budget="quick")
    content = json.loads(result.to_json())
    older = {{"findings": "diagnostics"}.get(name, name): value for name, value in content.items()}
    (tmp_path / "results.json").write_text(json.dumps(older | {"schema_version": 2}))
    assert len(result.findings) > 1
    assert Evaluation.load(tmp_path).findings == Evaluation.load(result.save(tmp_path / "now")).findings


@pytest.mark.parametrize("version", [0, 4, "2", True, None, 1.5])
def test_a_file_of_another_version_is_told(sound, tmp_path, version):
    content = sound[1] | {"schema_version": version}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has schema version .*, this release reads 1 to 3"):
        Evaluation.load(tmp_path)


def test_what_a_later_release_adds_is_passed_over(sound, tmp_path):
    folder, content = sound
    content = copy.deepcopy(content) | {"another": 1}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert np.array_equal(Evaluation.load(tmp_path).distance["l2"], Evaluation.load(folder).distance["l2"])


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_what_is_written_is_read(tmp_path, task, norm):
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    y = (x[:, 0] > 0).astype(int) if task == "classification" else 3 * x[:, 0]
    result = evaluate(lambda v: 3 * v, (x, y), norms=norm, task=task, **QUICK)
    again = Evaluation.load(result.save(tmp_path))
    assert again.curves == result.curves
    assert again.to_json() == result.to_json()


def test_radii_that_agree_in_six_digits_keep_their_columns(tmp_path):
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    radii = [0.10000001, 0.10000002, 0.2]
    result = evaluate(lambda v: 3 * v, (x, 3 * x[:, 0]), epsilons=radii, task="regression", **QUICK)
    header = (result.save(tmp_path) / "samples.csv").read_text().splitlines()[0].split(",")
    expected = ["error_l2_0", "error_l2_0.10000001", "error_l2_0.10000002", "error_l2_0.2"]
    assert [name for name in header if name.startswith("error_")] == expected
    assert [name for name in result.to_pandas().columns if name.startswith("error_")] == expected


def test_a_class_named_like_a_formula_is_no_formula_in_the_tables(tmp_path):
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    for first, second in (("=1+1", "-2"), ("@a", "+cmd|' /C calc'!A0")):
        names = np.where(x[:, 0] > 0, first, second)
        folder = evaluate(lambda v: 3 * v, (x, names), epsilons=[0.1], **QUICK).save(tmp_path)
        cells = [row.split(",")[2] for row in (folder / "classes.csv").read_text().splitlines()[1:]]
        assert set(cells) == {f"'{first}", second if second == "-2" else f"'{second}"}
        assert first in json.loads((folder / "results.json").read_text())["class_names"]
