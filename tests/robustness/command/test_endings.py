"""How the command ends where the user's code, the disk, the terminal or another run gets in the way: in one line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.cli import main
from rai_toolbox.robustness import Evaluation, InputError, compare, evaluate
from rai_toolbox.robustness._files import claimed

MODELS = """
import torch
from torch import nn

def plane():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    return net

class After(nn.Module):
    def __init__(self, calls, code):
        super().__init__()
        self.net, self.left, self.code = plane(), calls, code
    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise SystemExit(self.code)
        return self.net(x)

def leaves():
    raise SystemExit(0)

def leaves_at_once():
    return After(0, 0)

def leaves_with_gradients():
    return After(1, 0)

def leaves_at_the_key():
    return After(2, 0)

def leaves_later():
    return After(6, 0)

def leaves_in_to():
    class Leaves(nn.Module):
        def to(self, *args, **kwargs):
            raise SystemExit(0)
    return Leaves()

def in_place():
    class Subtracts(nn.Module):
        def forward(self, x):
            return x.sub_(0.5)
    return nn.Sequential(Subtracts(), nn.ReLU(inplace=True), plane())

def shift(x):
    return x.add_(0.25)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("models.py").write_text(MODELS)
    Path("script.py").write_text("import sys\ndef make():\n    return None\nsys.exit(0)\n")
    x = np.linspace(-1, 1, 40, dtype=np.float32)
    x = np.stack([x, np.zeros_like(x)], axis=1)
    np.savez("data.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    return tmp_path


def words(*more):
    given = list(more)
    for flag, value in (("--model", "models.py:plane"), ("--data", "data.npz"), ("--out", "out"), ("--steps", "3")):
        if flag not in given:
            given += [flag, value]
    return ["evaluate", *given, "--restarts", "1", "--no-diagnostics"]


def run(*more):
    return main(words(*more))


def outside(*more, **options):
    """Run in a process of its own, for what happens to the streams and at the interpreter's end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "rai_toolbox", *words(*more)], env=environment, **options)


def error_of(capsys):
    captured = capsys.readouterr().err
    # what it costs may have been said before
    lines = [line for line in captured.splitlines() if line.strip() and not line.startswith("about 0:")]
    assert len(lines) == 1, captured
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured
    return lines[0]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("script.py:make", 2), ("models.py:leaves", 2), ("models.py:leaves_at_once", 2),
        ("models.py:leaves_with_gradients", 2), ("models.py:leaves_at_the_key", 2), ("models.py:leaves_later", 4),
        ("models.py:leaves_in_to", 4),
    ],
)  # fmt: skip
def test_a_model_that_ends_the_program_does_not_pass_the_gate(place, capsys, model, code):
    assert run("--model", model, "--fail-under", "0@l2:0.5") == code
    assert "SystemExit" in error_of(capsys)
    assert not Path("out/results.json").exists()


def test_a_script_without_a_main_guard_is_told_what_to_do(place, capsys):
    assert run("--model", "script.py:make") == 2
    assert "if __name__ == '__main__'" in error_of(capsys)
    assert run("--preprocess", "script.py:make") == 2
    assert "SystemExit" in error_of(capsys)
    assert run("--data", "script.py:make") == 2
    assert "SystemExit" in error_of(capsys)


def test_a_model_in_place_on_its_input_is_evaluated_and_the_data_stay(place, capsys):
    assert run("--model", "models.py:in_place", "--preprocess", "models.py:shift", "--epsilons", "0.1") == 0
    sys.modules.pop("models", None)
    x = np.random.default_rng(0).random((20, 2)).astype(np.float32)
    y = (x[:, 0] > 0.5).astype(np.int64)
    before = x.copy()

    def subtracts(batch):
        batch.data.sub_(0.5)
        return batch * 2 - batch.flip(1)

    evaluate(subtracts, (x, y), epsilons=[0.1], steps=3, restarts=1)
    assert np.array_equal(x, before)


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", "18446744073709551616"), ("--seed", "-1"), ("--device", "meta"), ("--out", ""), ("--out", " "),
        ("--epsilons", "1" * 400), ("--steps", "1" * 400), ("--time-limit", "1e999999"), ("--samples", "-5"),
    ],
)  # fmt: skip
def test_a_flag_out_of_range_is_refused_in_one_line(place, capsys, more):
    code = run(*more)
    if more[0] == "--time-limit":
        assert code == 0  # infinity is a limit that never comes
        return
    assert code == 2
    assert len(error_of(capsys)) < 600
    assert not Path("results.json").exists()


@pytest.mark.parametrize(
    "entry", ["seed", "epsilons", "steps", "time-limit", "samples", "norm", "batch-size", "frozen"]
)
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_long_number_in_a_configuration_is_refused_in_one_line(place, capsys, entry, digits):
    Path("c.toml").write_text(f"{entry} = {'7' * digits}\n")
    flags = words("--config", "c.toml")
    code = main([word for word in flags if word not in ("--steps", "3")] if entry == "steps" else flags)
    if code == 0:
        capsys.readouterr()
        assert (entry, digits) in {("samples", 20), ("samples", 400), ("epsilons", 20), ("time-limit", 20)}
        return
    assert code == 2
    error_of(capsys)


def test_radii_near_the_largest_number_warn_of_nothing(place, capfd):
    assert run("--epsilons", "1e308,1e-308", "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_names_that_a_plot_would_read_as_formulas_are_drawn_as_they_are(place, recwarn):
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    y = (x[:, 0] > 0).astype(np.int64)
    names = [r"$\frac{$ _x", "_hidden", "名" * 3, "n" * 10**5, "a\nb", "=1+1"]
    options = {"epsilons": [0.5], "steps": 3, "restarts": 1, "diagnostics": False}
    made = [evaluate(lambda v: 3 * v, (x, y), described={"model": name}, **options) for name in names]
    for first, second in itertools.pairwise(made):
        folder = compare(first, second).save(place / "both")
        assert (folder / "comparison.png").stat().st_size > 1000
    assert made[0].save(place / "one").exists()
    assert not [str(w.message) for w in recwarn]


def test_an_ascii_terminal_gets_the_table(place):
    Path("modèle.py").write_text(MODELS)
    done = outside("--model", "modèle.py:plane", env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"accuracy of mod\\xe8le.py:plane under attack" in done.stdout
    assert b"100.0 %" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_standard_output_is_told_in_one_line_after_the_report(place):
    with open("/dev/full", "wb") as full:
        done = outside("--json", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == b"error: standard output cannot be written: No space left on device"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert json.loads(Path("out/results.json").read_text())["complete"]


def test_a_reader_that_leaves_does_not_change_the_exit_code(place):
    process = subprocess.Popen(
        [sys.executable, "-m", "rai_toolbox", *words("--fail-under", "1@l2:0.9", "--json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(120) == 1
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert b"Traceback" not in said
    assert b"Exception ignored" not in said


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of some kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_finished_and_resume_goes_on(place, small_disk, capsys):
    disk = small_disk(64)
    out = str(disk / "out")
    assert run("--out", out, "--batch-size", "2") == 4  # in the journal
    assert "No space left on device" in (said := error_of(capsys))
    assert "--resume" in said
    kept = list((disk / "out" / "unfinished").glob("*.npz"))
    assert kept
    assert not list(disk.rglob(".partial-*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert run("--out", out, "--batch-size", "2", "--resume") == 0
    assert Evaluation.load(disk / "out").complete
    assert not (disk / "out" / "unfinished").exists()


def fill(path):
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_at_the_report_leaves_the_earlier_one(place, small_disk, capsys):
    disk = small_disk(4096)
    out = disk / "out"
    assert run("--out", str(out)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    filler = disk / "filler"
    fill(filler)
    os.truncate(filler, filler.stat().st_size - 60 * 1024)  # the journal fits, the report does not
    capsys.readouterr()
    assert run("--out", str(out), "--seed", "1") == 4
    assert "No space left on device" in (said := error_of(capsys))
    assert "--resume" in said
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {name: content for name, content in after.items() if name != "config.toml"} == {
        name: content for name, content in before.items() if name != "config.toml"
    }
    filler.unlink()
    assert run("--out", str(out), "--seed", "1", "--resume") == 0


def test_a_crash_in_the_middle_of_the_report_leaves_no_mixture(place, monkeypatch):
    assert run() == 0
    replaced = []

    def crash(source, target, *, replace=os.replace):
        if Path(target).name in {"report.html", "curve.csv", "results.json"}:
            replaced.append(target)
        if len(replaced) > 1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert run("--seed", "1") == 130
    assert not Path("out/results.json").exists()
    assert not list(Path("out").glob(".partial-*"))
    assert run("--seed", "1", "--resume") == 0
    assert json.loads(Path("out/results.json").read_text())["settings"]["seed"] == 1


def test_a_folder_in_use_is_refused_and_the_other_run_keeps_its_own(place, capsys):
    ready, done = threading.Event(), threading.Event()

    def hold():
        with claimed(Path("out")):
            Path("out/unfinished").mkdir()
            Path("out/unfinished/run.json").write_text("{}")
            Path("out/.partial-other").write_bytes(b"half")
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert ready.wait(60)
        for flag in ("--overwrite", "--resume"):
            assert run(flag) == 2
            said = error_of(capsys)
            assert f"in use by process {os.getpid()} on " in said
        assert Path("out/unfinished/run.json").exists()
        assert Path("out/.partial-other").exists()
        with pytest.raises(InputError, match="in use by process"), claimed(Path("out")):
            pass
    finally:
        done.set()
        thread.join()
    assert run("--overwrite") == 0
    assert not [path.name for path in Path("out").iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone cannot be set here")
@pytest.mark.parametrize("name", ["report.html", "corruptions.csv", "config.toml", "results.json"])
def test_files_that_no_evaluation_wrote_are_neither_replaced_nor_removed(place, capsys, name):
    Path("mine").mkdir()
    for other in (name, "notes.txt"):
        (Path("mine") / other).write_text('{"of": "mine"}')
    assert run("--out", "mine") == 2
    assert f"has {name}, which no evaluation wrote" in error_of(capsys)
    assert sorted(path.name for path in Path("mine").iterdir()) == sorted([name, "notes.txt"])
    assert (Path("mine") / name).read_text() == '{"of": "mine"}'
    assert run("--out", "report") == 0
    if name != "config.toml":  # which only the command writes
        with pytest.raises(InputError, match="which no evaluation wrote"):
            Evaluation.load("report").save("mine")
    assert run("--out", "report") == 0  # in place of an earlier report


def test_a_comparison_replaces_no_file_of_another(place, capsys):
    assert run("--out", "report") == 0
    Path("comparison.csv").write_text("mine")
    capsys.readouterr()
    assert main(["compare", "report", "report", "--out", "."]) == 2
    assert "has comparison.csv, which no evaluation wrote" in error_of(capsys)
    assert Path("comparison.csv").read_text() == "mine"
    for _ in range(2):
        assert main(["compare", "report", "report", "--out", "both"]) == 0


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Nonsense/Zone", "UTC-99:99", ""])
def test_any_time_zone_will_do(place, monkeypatch, zone):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        assert run() == 0
    time.tzset()


def test_the_lock_of_a_killed_run_is_free(place):
    Path("out").mkdir()
    Path("out/.lock").touch()
    Path("out/.lock-holder").write_text("process 1 on elsewhere, since long ago")
    assert run() == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser writes in read-only folders too")
def test_a_read_only_output_folder_is_refused(place, capsys):
    Path("out").mkdir(mode=0o500)
    assert run() == 2
    assert "cannot be written to" in error_of(capsys)


def test_a_symlinked_output_folder_is_written_through(place, capsys):
    Path("real").mkdir()
    Path("out").symlink_to("real")
    assert run() == 0
    assert Path("out").is_symlink()
    assert Path("real/results.json").exists()
    Path("dangling").symlink_to("nowhere")
    capsys.readouterr()
    assert run("--out", "dangling") == 2
    error_of(capsys)
    Path("loop").symlink_to("loop")
    assert run("--out", "loop") == 2
    error_of(capsys)
    # files of the folder that are links are replaced, not followed
    Path("precious.json").write_text("mine")
    Path("linked").mkdir()
    Path("linked/results.json").symlink_to(Path("precious.json").resolve())
    assert run("--out", "linked") == 0
    assert Path("precious.json").read_text() == "mine"
