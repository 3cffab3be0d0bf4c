"""ONNX files, read by the real converter, which runs where a torchvision fits torch: `make test-torch TORCH=2.14.1`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.robustness import evaluate
from rai_toolbox.robustness.models._load import load_model

onnx = pytest.importorskip("onnx")
# The converter imports torchvision: one that was built for another torch raises no ImportError.
pytest.importorskip("onnx2pytorch", exc_type=Exception)


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)).eval()


def write(net: nn.Module, path: Path, batch: int | str) -> None:
    """Write the network as an exporter does: operators by name, weights as initializers, the input's batch as told."""
    weights = [parameter.detach().numpy() for parameter in net.parameters()]
    names = ["kernel", "offset", "matrix", "bias"]
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["image", "kernel", "offset"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("Flatten", ["r"], ["f"]),
            node("Gemm", ["f", "matrix", "bias"], ["logits"], transB=1),
        ],
        "net",
        [tensor("image", onnx.TensorProto.FLOAT, [batch, 1, 8, 8])],
        [tensor("logits", onnx.TensorProto.FLOAT, [batch, 10])],
        [onnx.numpy_helper.from_array(value, name) for name, value in zip(names, weights, strict=True)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.mark.parametrize("batch", ["any", 1, 4])
def test_outputs_and_gradients_are_those_of_the_module(net: nn.Module, tmp_path: Path, batch: int | str) -> None:
    write(net, tmp_path / "model.onnx", batch)
    model = load_model(str(tmp_path / "model.onnx"))
    x = torch.rand(6, 1, 8, 8, requires_grad=True)
    expected, got = net(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", ["any", 2])
def test_it_is_evaluated_as_the_module_is(net: nn.Module, tmp_path: Path, batch: int | str) -> None:
    write(net, tmp_path / "model.onnx", batch)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = x.numpy(), net(x).argmax(dim=1).numpy()
    options = {"epsilons": [0.5], "steps": 5, "restarts": 2, "diagnostics": False}
    found = [
        evaluate(model, data, **options).distance["l2"] for model in (net, load_model(str(tmp_path / "model.onnx")))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


def test_what_is_no_onnx_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="cannot be converted by onnx2pytorch"):
        load_model(str(tmp_path / "model.onnx"))
