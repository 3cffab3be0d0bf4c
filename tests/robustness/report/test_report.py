"""The report: escaped, self-contained, and looked at by a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.robustness import Evaluation, Samples, compare, evaluate
from rai_toolbox.robustness.data._rows import ArrayRows
from rai_toolbox.robustness.report._pictures import curve_drawing, encode_png

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUICK = {"steps": 5, "restarts": 1}
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """The elements of a page, with what would load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "srcset", "action") and v and not v.startswith(("data:", "#"))
        ]
        if tag == "img":
            self.images.append(values.get("alt"))


@pytest.fixture(scope="module")
def report(digits, small_net):
    x, y = digits
    return evaluate(
        small_net, (x[:24], y[:24]), norms=["l2", "linf"], **QUICK, described={"model": "digits", "data": "digits"}
    )


def test_the_page_loads_nothing_runs_nothing_and_says_what_its_pictures_show(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    assert page.images
    assert all(alt for alt in page.images)
    assert page.tags.count("h1") == 1
    assert 'lang="en"' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<th scope=") > 20
    # The advice of one check names others.
    shown = html.unescape(text)
    assert all(f"{finding.check}</code>" in shown and finding.title in shown for finding in report.findings)
    assert all(f"{100 * point.value:.1f}\u00a0%" in text for point in report.curves["l2"].points)


def test_names_are_escaped_wherever_they_come_from(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    names = (f"a{HOSTILE}", f"b{HOSTILE}")
    samples = Samples(ArrayRows(x), y, class_names=names, feature_names=tuple(f"{HOSTILE}{i}" for i in range(3)))
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]]))
        model.bias.zero_()
    result = evaluate(
        model, samples, epsilons=[0.5, 3], **QUICK, described={"model": HOSTILE, "data": HOSTILE, "command": HOSTILE}
    )
    result.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert HOSTILE not in text
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;" in text


def test_long_names_are_short_where_they_are_shown_and_whole_in_the_results(half_plane, tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    y = half_plane(torch.from_numpy(x)).argmax(dim=1).numpy()
    names = ("a" * 100_000, "b" * 100_000)
    data = Samples(ArrayRows(x), y, class_names=names, feature_names=("c" * 100_000, "d"))
    evaluate(half_plane, data, diagnostics=False, **QUICK).save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["class_names"] == list(names)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert all(sizes[name] < 100_000 for name in ("report.html", "classes.csv", "samples.csv", "card.md"))
    text = (tmp_path / "report.html").read_text()
    assert text.count("a" * 59 + "…") > 1
    assert "a" * 60 not in text
    with pytest.raises(ValueError, match=r"has no class 'a{59}…'"):
        evaluate(half_plane, data, classes=["b" * 100_000, "e"], **QUICK)


def test_a_figure_is_never_broken_in_two(digits, small_net, tmp_path):
    x, y = digits
    evaluate(small_net, (x[:8], y[:8]), epsilons=[0.123456], diagnostics=False, **QUICK).save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"\.cards b {[^}]*white-space: nowrap", text)
    assert "ε\u00a0=\u00a00.123456 (l2)" in text


def test_every_kind_of_data_has_its_gallery(tmp_path):
    rng = np.random.default_rng(0)
    for shape, sign in (
        ((3, 8, 8), "<img"),
        ((2, 50), "<polyline"),
        ((40,), "<polyline"),
        ((5,), "Feature"),
        ((2, 2, 2, 2), "Feature"),
    ):
        x = rng.normal(size=(10, *shape)).astype(np.float32)
        model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2))
        y = model(torch.from_numpy(x)).argmax(dim=1).numpy()
        evaluate(model, (x, y), diagnostics=False, **QUICK).save(tmp_path)
        gallery = (tmp_path / "report.html").read_text().partition('class="gallery"')[2].partition("</ul>")[0]
        assert sign in gallery


def test_the_curve_lies_in_its_band_between_the_reported_points_too(report):
    for norm, curve in report.curves.items():
        drawing = curve_drawing({"": report}, norm)
        line, band = (
            np.array([pair.split(",") for pair in drawing["lines"][0][part].split()], dtype=float)
            for part in ("line", "band")
        )
        upper, lower = band[: len(line)], band[len(line) :][::-1]
        assert len(line) > 200
        assert (upper[:, 0] == line[:, 0]).all()
        assert (lower[:, 0] == line[:, 0]).all()
        # A picture's y grows downwards.
        assert (upper[:, 1] <= line[:, 1]).all()
        assert (lower[:, 1] >= line[:, 1]).all()
        for point in curve.points:
            y = drawing["bottom"] - (drawing["bottom"] - drawing["top"]) * point.value
            assert np.abs(line[:, 1] - y).min() < 0.02


def test_l0_without_bounds_says_that_a_feature_may_take_any_value(half_plane, blobs, tmp_path):
    for bounds, said in ((None, True), ((-1, 1), False)):
        evaluate(half_plane, blobs, norms="l0", bounds=bounds, diagnostics=False, **QUICK).save(tmp_path)
        assert ("may take any value" in (tmp_path / "report.html").read_text()) is said


def test_a_png_has_the_pixels_it_was_given():
    for pixels in (np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(36, dtype=np.uint8).reshape(3, 4, 3)):
        content = encode_png(pixels)
        assert struct.unpack(">II", content[16:24]) == (4, 3)
        raw = zlib.decompress(re.search(rb"IDAT(.*)....\x00\x00\x00\x00IEND", content, re.DOTALL)[1])
        rows = np.frombuffer(raw, np.uint8).reshape(3, -1)
        assert (rows[:, 0] == 0).all()
        assert (rows[:, 1:].reshape(pixels.shape) == pixels).all()


def test_a_result_of_one_sample_or_of_none_that_is_right_has_a_report(half_plane, tmp_path):
    x = np.array([[0.5, 0.0]], dtype=np.float32)
    for label in (1, 0):
        evaluate(half_plane, (x, [label]), **QUICK).save(tmp_path)
        assert Evaluation.load(tmp_path).curves["l2"].points[0].value == label


@pytest.fixture
def pages(report, half_plane, blobs, tmp_path):
    """Pages of every kind, by name: their HTML."""
    x, y = blobs
    long = "a name that is long_and_has_no_blank_where_a_line_could_end_" * 2
    table = {"x": np.repeat(x, 4, axis=1), "y": y, "feature_names": [f"{long}{i}" for i in range(8)]}
    wide = nn.Linear(8, 2)
    series = {"x": np.repeat(x[:, :1, None], 60, axis=2), "y": y, "class_names": [long, "b"]}
    flat = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    line = nn.Linear(2, 1)
    results = {
        "images": report,
        "table": evaluate(wide, table, **QUICK, described={"model": long, "data": long}),
        "series": evaluate(flat, series, **QUICK),
        "regression": evaluate(line, (x, x[:, 0]), task="regression", **QUICK),
        "none right": evaluate(half_plane, (x, 1 - y), **QUICK),
    }
    found = {name: (result.save(tmp_path / name) / "report.html").read_text() for name, result in results.items()}
    comparison = compare(report, report).save(tmp_path / "comparison") / "comparison.html"
    return found | {"comparison": comparison.read_text()}


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_a_browser_shows_every_page_without_errors_requests_or_anything_cut_off(pages, tmp_path):
    # A probe outside of the pages, which themselves may run nothing; it frames each as wide as a phone and as a desk.
    names = json.dumps(list(pages))
    contents = json.dumps([base64.b64encode(text.encode()).decode() for text in pages.values()])
    (tmp_path / "probe.html").write_text(
        """<!doctype html><meta charset=utf-8><pre id=o></pre><script>
        const names = NAMES, contents = CONTENTS, said = {};
        const decoded = text => new TextDecoder().decode(Uint8Array.from(atob(text), c => c.charCodeAt(0)));
        const wide = e => e.scrollWidth > e.clientWidth + 1;
        function look(frame) {
          const page = frame.contentDocument, root = page.documentElement;
          const loaded = frame.contentWindow.performance.getEntriesByType("resource");
          const column = page.querySelector("svg .column"), tip = column.querySelector(".tip");
          const hidden = getComputedStyle(tip).visibility;
          column.focus();
          return {
            fits: !wide(root),
            cut: [...page.querySelectorAll("li, .figure, .check, main, header, p")].filter(wide).length,
            drawn: [...page.images].every(i => i.complete && i.naturalWidth > 0),
            loaded: loaded.filter(e => !e.name.startsWith("data:")).length,
            tip: hidden + " " + getComputedStyle(tip).visibility,
          };
        }
        for (const [i, name] of names.entries()) for (const width of [390, 1400]) {
          const frame = document.createElement("iframe");
          frame.style = `width:${width}px;height:900px;border:0`;
          frame.onload = () => {
            said[name + " " + width] = look(frame);
            document.getElementById("o").textContent = JSON.stringify(said);
          };
          frame.srcdoc = decoded(contents[i]);
          document.body.append(frame);
        }
        </script>""".replace("NAMES", names).replace("CONTENTS", contents)
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000"]
    flags += ["--virtual-time-budget=10000", "--dump-dom", f"file://{tmp_path / 'probe.html'}"]
    shown = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(html.unescape(re.search(r'<pre id="o">(.*?)</pre>', shown.stdout)[1]))
    right = {"fits": True, "cut": 0, "drawn": True, "loaded": 0, "tip": "hidden visible"}
    assert said == {f"{name} {width}": right for name in pages for width in (390, 1400)}
    assert "CONSOLE" not in shown.stderr
