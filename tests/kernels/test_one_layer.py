"""One layer knows the machine: none above it asks which device a tensor is on, or whether its values may be seen."""

from __future__ import annotations

import re
from pathlib import Path

import rai_toolbox

ASKS = re.compile(r"\bcan_branch_on_values\b|\bdevice\.type\b|\.is_(cuda|cpu|mps|xpu)\b")


def test_only_the_kernels_ask_which_machine_a_tensor_is_on() -> None:
    source = Path(rai_toolbox.__file__).parent
    files = source.rglob("*.py")
    asking = {path.relative_to(source).parts[0] for path in files if ASKS.search(path.read_text("utf-8"))}
    assert asking == {"kernels"}
