"""Every example runs, with the real libraries and warnings as errors, and does what it says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import has_fsdp2_on_a_cpu

from rai_toolbox.cli import main
from rai_toolbox.robustness import Evaluation, evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {
    "accelerate_loop",
    "averaged_weights",
    "compiled_step",
    "data_parallel",
    "diabetes",  # this and two others by tests/robustness/test_documented_commands.py
    "digits",  # what the others import
    "fsdp2",
    "lightning_module",
    "mixed_precision",
    "static_export",
    "transformers_digits",
    "transformers_trainer",
    "vmapped_attack",
    "waves",
    "wine",
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_mixed_precision(example: Any) -> None:
    assert example("mixed_precision").main() > 0.8


def test_averaged_weights(example: Any) -> None:
    assert min(example("averaged_weights").main()) > 0.7


def test_functional_within_vmap_and_grad(example: Any) -> None:
    losses = example("vmapped_attack").main()
    assert (losses[:, 1] > losses[:, 0] * 1.05).all()


def test_accelerate(example: Any) -> None:
    assert example("accelerate_loop").main() > 0.7


# Lightning 2.6 asks its treespecs in a way that torch 2.13 deprecates, and would like more workers.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning(example: Any) -> None:
    assert example("lightning_module").main() > 0.7


def test_transformers_trainer(example: Any) -> None:
    first, last = example("transformers_trainer").main()
    assert last < first - 0.1


def test_a_classifier_of_transformers_is_evaluated_as_it_is(example: Any) -> None:
    digits = example("transformers_digits")
    result = evaluate(digits.model(), digits.test_data(), budget="quick", diagnostics=False)
    points = result.curves["l2"].points
    assert points[0].value > 0.7 > 0.3 > points[-1].value


# Inductor imports parts of torch that use torch.jit, which torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
# Dynamo asks the loss, which is no leaf, for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_step(example: Any) -> None:
    assert example("compiled_step").main("aot_eager") > 0.7


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fsdp2", "data_parallel"])
def test_on_two_ranks_under_torchrun(name: str, tmp_path: Path) -> None:
    if name == "fsdp2" and not has_fsdp2_on_a_cpu():
        pytest.skip("this torch's fully_shard does not run on a CPU")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, f"{name}.py", *([str(tmp_path)] if name == "data_parallel" else [])]
    ran = subprocess.run(
        command,
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.rpartition("accuracy: ")[2]) > 0.7


def test_a_program_of_a_fixed_batch_is_evaluated_as_one_of_any(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example("static_export").main(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("static", "dynamic"):
        words = ["--model", f"{name}.pt2", "--data", "digits.npz", "--out", name, "--batch-size", "7", "--quiet"]
        assert main(["evaluate", *words, "--budget", "quick", "--epsilons", "0.5", "--no-diagnostics"]) == 0
        found[name] = Evaluation.load(name)
    assert found["static"].curves["l2"].points[0].value > 0.8
    np.testing.assert_allclose(found["static"].distance["l2"], found["dynamic"].distance["l2"], rtol=1e-3)
