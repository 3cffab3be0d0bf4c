"""The page on results.json names every field that is written, with its type, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rai_toolbox.robustness import evaluate
from rai_toolbox.robustness.attack._settings import NORMS
from rai_toolbox.robustness.report._schema import SCHEMA, SCHEMA_VERSION

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "results.md").read_text("utf-8")
FIELDS = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
KINDS = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None), "list": list}
KINDS["object"] = dict
DESCRIBED = {"model": "m", "data": "d", "weights": "w", "preprocess": "p", "command": "c"}


def entries(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of each documented value, and the value; what is not documented is yielded at its leaves."""
    path = re.sub(rf"(?<=[._])({'|'.join(NORMS)})(?=$|[.\[])", "NORM", path)
    path = re.sub(r"^corruptions\.\w+", "corruptions.NAME", path)
    if path in FIELDS or not isinstance(value, (dict, list)):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from entries(part, f"{path}.{name}" if path else name)
    else:
        for part in value:
            yield from entries(part, f"{path}[]")


@pytest.fixture(scope="module")
def written() -> list[tuple[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(12, 3)
    brief = {"steps": 2, "restarts": 1, "described": DESCRIBED}
    first = evaluate(
        nn.Linear(3, 2), (x, (x[:, 0] > 0).long()), norms=("l2", "linf"), epsilons={"l2": [0.1]},
        extra_epsilons={"l2": [0.2]}, bounds=(-9, 9), mask=[True, True, False],
        corruptions={"dimmed": lambda x, severity: x / severity}, **brief,
    )  # fmt: skip
    brief |= {"diagnostics": False, "keep_points": True}
    second = evaluate(nn.Linear(3, 1), (x, x[:, :1]), task="regression", **brief)
    third = evaluate(nn.Linear(3, 1), (x, x[:, :1]), task="regression", also_try=second, **brief)
    fourth = evaluate(nn.Linear(3, 2), (x, (x[:, 0] > 0).long()), draws=6, **brief)
    return [entry for result in (first, second, third, fourth) for entry in entries(json.loads(result.to_json()))]


def test_every_field_that_is_written_is_on_the_page_and_the_other_way_round(written) -> None:
    assert {path for path, _ in written} == set(FIELDS)


def test_the_values_have_the_types_of_the_page(written) -> None:
    for path, value in written:
        kinds = tuple(KINDS[word] for word in re.split(r", | or ", FIELDS[path].strip()))
        flat = [kind for group in kinds for kind in (group if isinstance(group, tuple) else (group,))]
        assert type(value) in flat, f"{path} is {value!r}, and {FIELDS[path]} on the page"


def test_the_page_names_the_schema_and_its_version() -> None:
    assert f"`{SCHEMA}`" in PAGE
    assert f"`schema_version` is {SCHEMA_VERSION}." in PAGE
