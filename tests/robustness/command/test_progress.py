"""What is said of a long run where there is no terminal."""

from __future__ import annotations

import time

from rai_toolbox.robustness.command import _console


def test_a_line_a_minute_inside_a_batch_too(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with _console.progress(shown=True) as progress:
        for _ in range(40):
            now += 10
            progress.beat("Searching", 0, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "Searching: 0 of 2, 0:00:50 since its start"


def test_the_time_left_is_told_from_what_is_done(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with _console.progress(shown=True) as progress:
        progress.beat("Searching", 0, 4)
        now = 100.0
        progress("Searching", 1, 4)
    assert capsys.readouterr().err == "Searching: 1 of 4, about 0:05:00 left\n"
