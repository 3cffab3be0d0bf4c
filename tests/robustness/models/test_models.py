"""Every form of a model file, and what is refused because it could run code."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import pickle
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.robustness import InputError, evaluate, load_model, load_preprocess

BUILD = """
from torch import nn
def build():
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout())
    return nn.Sequential(features, nn.Flatten(), nn.Linear(144, 3))
"""


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scope = {}
        exec(BUILD, scope)
        return scope["build"]().eval()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("build.py").write_text(BUILD)
    return tmp_path


def export(net, path="model.pt2", **options):
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "strict": False} | options
    torch.export.save(torch.export.export(net, (torch.rand(4, 1, 8, 8),), **dynamic), path)
    return path


def saved(net, kind):
    """Write the model in some form; return what the command is given."""
    if kind == "pt2":
        return export(net), None
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated
            torch.jit.trace(net, torch.rand(4, 1, 8, 8)).save("model.ts")  # pyright: ignore
        return "model.ts", None
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(net.state_dict(), "weights.safetensors")
        return "build.py:build", "weights.safetensors"
    content = net.state_dict() if kind == "state_dict" else {"state_dict": net.state_dict(), "epoch": 3}
    torch.save(content, "weights.pt")
    return "build.py:build", "weights.pt"


@pytest.mark.parametrize("kind", ["pt2", "torchscript", "safetensors", "state_dict", "checkpoint"])
def test_every_form_gives_the_models_own_answers_and_gradients(place, net, kind):
    spec, weights = saved(net, kind)
    model = load_model(spec, weights=weights)
    x = torch.rand(7, 1, 8, 8, requires_grad=True)
    assert torch.allclose(model(x), net(x), atol=1e-6)
    assert torch.allclose(torch.autograd.grad(model(x).sum(), x)[0], torch.autograd.grad(net(x).sum(), x)[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["pt2", "torchscript"])
def test_model_files_can_be_evaluated(place, net, kind):
    spec, _ = saved(net, kind)
    x = np.random.default_rng(0).random((12, 1, 8, 8), dtype=np.float32)
    y = net(torch.from_numpy(x)).argmax(dim=1).numpy()
    result = evaluate(load_model(spec), (x, y), epsilons=[0.1, 5], steps=5, restarts=1)
    assert result.curves["l2"].points[0].value == 1.0


def traced(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated; that two answers differ
        torch.jit.trace(net, torch.rand(4, 1, 8, 8), check_trace=False).save(path)  # pyright: ignore
    return path


def exported_program(net, *, decomposed):
    program = torch.export.export(net, (torch.rand(4, 1, 8, 8),), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own trees
        torch.export.save(program.run_decompositions() if decomposed else program, "model.pt2")
    return "model.pt2"


FILES = {
    "exported": lambda net: exported_program(net, decomposed=False),
    "decomposed": lambda net: exported_program(net, decomposed=True),
    "traced": lambda net: traced(net, "model.pt"),
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_whose_batch_norm_was_exported_in_training_mode_is_refused(place, net, form):
    trained = copy.deepcopy(net).train()
    with pytest.raises(
        InputError, match=r"'model\.pt2?' was exported in training mode.*call model\.eval\(\) before torch"
    ):
        load_model(FILES[form](trained))


@pytest.mark.parametrize("form", FILES)
def test_a_normalization_without_running_statistics_is_the_same_in_both_modes_and_read(place, form, capfd):
    def built(norm):
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)).eval()

    x = torch.rand(4, 1, 8, 8)
    for norm in (nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4), nn.BatchNorm2d(4)):
        model = built(norm)
        assert torch.allclose(load_model(FILES[form](model))(x), model(x), atol=1e-6)
    assert not capfd.readouterr().err


def test_a_scripted_model_in_training_mode_is_put_into_eval_mode(place, net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.script(copy.deepcopy(net).train()).save("model.pt")
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(load_model("model.pt")(x), net(x), atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_a_program_exported_for_one_batch_size_takes_any(place, net, size):
    torch.export.save(torch.export.export(net, (torch.rand(size, 1, 8, 8),), strict=False), "model.pt2")
    model = load_model("model.pt2")
    for count in (0, 1, 4, 7):
        x = torch.rand(count, 1, 8, 8, requires_grad=True)
        assert torch.allclose(model(x), net(x), atol=1e-6)
        mine, its = (torch.autograd.grad(one(x).square().sum(), x)[0] for one in (model, net))
        assert torch.allclose(mine, its, atol=1e-6)
    x = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)
    y = net(torch.from_numpy(x)).argmax(dim=1).numpy()
    result = evaluate(model, (x, y), epsilons=[0.1], steps=2, restarts=1, batch_size=5, diagnostics=False)
    assert result.curves["l2"].points[0].value == 1.0


def test_a_static_program_may_return_several_outputs(place, net):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"logits": self.net(x), "scale": x.new_tensor(3.0)}, x.flatten(1)

    torch.export.save(torch.export.export(Named(), (torch.rand(4, 1, 8, 8),), strict=False), "model.pt2")
    x = torch.rand(5, 1, 8, 8)
    named, flat = load_model("model.pt2")(x)
    assert torch.allclose(named["logits"], net(x), atol=1e-6)
    assert named["scale"] == 3
    assert torch.equal(flat, x.flatten(1))


class Evil:
    """A pickle that leaves a file when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def test_pickles_are_refused_unread(place, net):
    torch.save(net, "model.pt")
    with pytest.raises(InputError, match=r"is a pickle.*state_dict"):
        load_model("model.pt")
    torch.save({"weight": Evil()}, "evil.pt")
    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(InputError, match="pickle"):
            load_model(name)
        with pytest.raises(InputError, match="pickle"):
            load_model("build.py:build", weights=name)
    assert not Path("was-run").exists()


def test_weights_without_their_model_say_what_is_missing(place, net):
    torch.save(net.state_dict(), "weights.pt")
    with pytest.raises(InputError, match=r"is a state dict.*weights='weights\.pt'"):
        load_model("weights.pt")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    with pytest.raises(InputError, match="does not fit the model"):
        load_model("build.py:build", weights="other.pt")
    with pytest.raises(InputError, match="goes with a function"):
        load_model(export(net), weights="weights.pt")


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod."])
def test_weights_of_a_wrapped_model_are_those_of_the_model(place, net, prefix):
    wrapped = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save({"state_dict": wrapped | {"loss.weight": torch.ones(3)}}, "weights.pt")
    x = torch.rand(7, 1, 8, 8)
    assert torch.equal(load_model("build.py:build", weights="weights.pt")(x), net(x))
    other = {"teacher." + name: value for name, value in net.state_dict().items()}
    for unclear in (wrapped | other, {name: value for name, value in wrapped.items() if "running_mean" not in name}):
        torch.save(unclear, "weights.pt")
        with pytest.raises(InputError, match="does not fit the model"):
            load_model("build.py:build", weights="weights.pt")


def test_torchscript_given_as_weights_is_called_what_it_is(place, net):
    saved(net, "torchscript")
    with pytest.raises(InputError, match=r"is a TorchScript file.*model='model\.ts'"):
        load_model("build.py:build", weights="model.ts")


def test_did_you_mean_offers_functions_only(place):
    Path("user.py").write_text("import numpy as np\ndef model(): ...\n")
    with pytest.raises(InputError, match="has no function 'nope'; there is model"):
        load_model("user.py:nope")


def test_preprocessing_of_other_channels_than_the_data_have_is_not_blamed_on_the_model(place, net):
    x = np.zeros((4, 1, 8, 8), dtype=np.float32)
    with pytest.raises(InputError, match="preprocess has 3 channels, the data have 1"):
        evaluate(net, (x, np.zeros(4)), preprocess=load_preprocess("imagenet"), steps=2)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-2.1, 2.6)], ids=["bytes", "normalized"])
def test_statistics_of_images_in_0_to_1_are_refused_for_others(low, high):
    x = np.random.default_rng(0).uniform(low, high, (4, 3, 8, 8)).astype(np.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    for name in ("imagenet", "cifar10"):
        with pytest.raises(InputError, match=rf"'{name}' is for images in \[0, 1\], the data lie in"):
            evaluate(model, (x, np.zeros(4)), preprocess=load_preprocess(name), steps=2)


def test_images_with_their_channels_last_are_told_how_to_turn(net):
    x = np.zeros((4, 8, 8, 1), dtype=np.float32)
    with pytest.raises(InputError, match=r"\(2, 8, 8, 1\).*channels first here: x\.transpose\(0, 3, 1, 2\): it raised"):
        evaluate(net, (x, np.zeros(4)), steps=2)


def test_onnx_without_its_converter_says_what_would_do(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    Path("model.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(InputError, match=r"ONNX files are not supported without onnx2pytorch.*\.pt2"):
        load_model("model.onnx")


def test_a_converter_that_is_installed_and_cannot_be_imported_is_not_called_missing(place, monkeypatch):
    Path("onnx2pytorch.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "onnx2pytorch", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", types.ModuleType("onnx"))
    Path("model.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(InputError, match=r"installed, but importing it raised .*nms.*torchvision") as raised:
        load_model("model.onnx")
    assert "pip install" not in str(raised.value)


def test_onnx_is_what_its_converter_makes_of_it(place, net, monkeypatch):
    """A stand-in for the converter; the next test has the real one, where it is installed."""
    Path("model.onnx").write_bytes(b"a model")
    onnx, converter = types.ModuleType("onnx"), types.ModuleType("onnx2pytorch")
    vars(onnx)["load"] = lambda path: Path(path).read_bytes()
    vars(converter)["ConvertModel"] = {b"a model": net}.__getitem__
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    monkeypatch.setitem(sys.modules, "onnx2pytorch", converter)
    assert load_model("model.onnx") is net
    Path("model.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match="cannot be converted by onnx2pytorch: KeyError"):
        load_model("model.onnx")


def importable(*names):
    try:
        for name in names:
            importlib.import_module(name)
    except Exception:  # a torchvision that was built for another torch
        return False
    return True


@pytest.mark.skipif(
    not importable("onnx", "onnxscript", "onnx2pytorch"), reason="onnxscript, onnx2pytorch and its torchvision"
)
@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_is_the_same_model(place, net):
    x = torch.rand(4, 1, 8, 8)
    torch.onnx.export(net, (x,), "model.onnx", dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    model, x = load_model("model.onnx"), torch.rand(7, 1, 8, 8, requires_grad=True)
    assert torch.allclose(model(x), net(x), atol=1e-6)
    assert torch.allclose(torch.autograd.grad(model(x).sum(), x)[0], torch.autograd.grad(net(x).sum(), x)[0], atol=1e-6)


@pytest.mark.skipif(
    not importable("onnx", "onnxscript", "onnx2pytorch"), reason="onnxscript, onnx2pytorch and its torchvision"
)
@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_of_a_fixed_batch_takes_any(place, net):
    torch.onnx.export(net, (torch.rand(2, 1, 8, 8),), "model.onnx", verbose=False)
    model, x = load_model("model.onnx"), torch.rand(5, 1, 8, 8)
    assert torch.allclose(model(x), net(x), atol=1e-6)


def rewritten(path, change):
    """Write the archive again with `change(name, content)` applied to its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = {name: change(name, content) for name, content in members.items()}
    if changed == members:
        pytest.skip("this torch writes no such member")
    with zipfile.ZipFile("changed.pt2", "w") as archive:
        for name, content in changed.items():
            archive.writestr(name, content)
    return "changed.pt2"


# Where torch writes the graph and the inputs; the second name of each is that of torch 2.6.
GRAPH = ("models/model.json", "serialized_exported_program.json")
INPUTS = ("sample_inputs/model.pt", "serialized_example_inputs.pt")


def with_graph(change):
    def apply(name, content):
        if not name.endswith(GRAPH):
            return content
        graph = json.loads(content)
        change(graph)
        return json.dumps(graph).encode()

    return apply


def pickled_inputs(name, content):
    if not name.endswith(INPUTS):
        return content
    torch.save((Evil(),), "inputs.pt")
    return Path("inputs.pt").read_bytes()


def pickled_weights(name, content):
    if not name.endswith("model_weights_config.json"):
        return content
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def opaque_object(name, content):
    if not name.endswith("model_constants_config.json"):
        return content
    return json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}}}).encode()


def a_call(graph):
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"


def a_mapped_file(graph):
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def an_expression(graph):
    graph["extra"] = {"expr_str": "__import__('pathlib').Path('was-run').touch()"}


def a_name(graph):
    graph["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"] = "x\nimport os"


@pytest.mark.parametrize(
    "change",
    [
        pickled_inputs,
        pickled_weights,
        opaque_object,
        with_graph(a_call),
        with_graph(a_mapped_file),
        with_graph(an_expression),
        with_graph(a_name),
    ],
    ids=["inputs", "weights", "object", "call", "file", "expression", "name"],
)
def test_an_exported_archive_that_could_run_code_is_refused(place, net, change):
    load_model(export(net))
    with pytest.raises(InputError, match="could run code"):
        load_model(rewritten("model.pt2", change))
    assert not Path("was-run").exists()


def test_reading_a_torchscript_file_warns_of_nothing_and_a_broken_one_names_torch_export(place, net):
    spec, _ = saved(net, "torchscript")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(spec)(torch.rand(2, 1, 8, 8))
    with zipfile.ZipFile(spec) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile("broken.pt", "w") as archive:
        for entry, content in members:
            archive.writestr(entry.filename, content.replace(b"forward", b"for ward"))
    with pytest.raises(InputError, match=r"cannot be loaded.*torch\.export\.save"):
        load_model("broken.pt")


class Writes(nn.Module):
    """What TorchScript lets a model do beside computing."""

    def forward(self, x):
        torch.save(x, "was-run")
        return x


@pytest.mark.parametrize(
    "call",
    [
        "torch.save(x, 'was-run')",
        "ops.aten.save(x, 'was-run')",
        "torch . save(x, 'was-run')",
        "getattr(torch, 'sa' + 've')(x, 'was-run')",
        "torch.from_file('was-run', True, 4)",
        "ops.aten.from_file('was-run', True, 4)",
    ],
)
def test_a_torchscript_file_that_reaches_out_is_refused(place, call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.script(Writes()).save("model.pt")
    with zipfile.ZipFile("model.pt") as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile("changed.pt", "w") as archive:
        for entry, content in members:
            archive.writestr(entry.filename, content.replace(b'torch.save(x, "was-run")', call.encode()))
    with pytest.raises(InputError, match="must not use files or processes"):
        load_model("changed.pt")
    assert not Path("was-run").exists()


def test_of_two_entries_of_one_name_both_are_looked_at(place, net):
    export(net)
    with zipfile.ZipFile("model.pt2") as archive:
        name = next(name for name in archive.namelist() if name.endswith(GRAPH))
        good = archive.read(name)
    graph = json.loads(good)
    a_call(graph)
    with zipfile.ZipFile("model.pt2", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the name is there already
        archive.writestr(name, json.dumps(graph))
        archive.writestr(name, good)
    with pytest.raises(InputError, match="could run code"):
        load_model("model.pt2")


@pytest.mark.parametrize("kind", ["pt2", "torchscript"])
def test_an_archive_whose_names_climb_out_writes_nothing(place, net, kind):
    spec, _ = saved(net, kind)
    with zipfile.ZipFile(spec, "a") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("model/../../escaped", "x")
    before = sorted(place.parent.rglob("*"))
    with contextlib.suppress(InputError):
        load_model(spec)
    assert sorted(place.parent.rglob("*")) == before


def test_garbage_files_are_one_line(place):
    for name in ("m.pt2", "m.pt", "m.safetensors", "m.ts", "m.txt"):
        Path(name).write_bytes(b"\x00garbage\xff" * 9)
        with pytest.raises(InputError) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError) as caught:
            load_model("build.py:build", weights=name)
        assert "\n" not in str(caught.value)


def test_normalize_is_per_channel(place):
    x = torch.rand(2, 3, 4, 4)
    normalize = load_preprocess("normalize:0.1,0.2,0.3/1,2,4")
    expected = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    assert torch.allclose(normalize(x), expected)
    for bad in ("normalize:1/0", "normalize:1,2/1", "normalize:x/1", "standardize", "build.py:missing"):
        with pytest.raises(InputError):
            load_preprocess(bad)


def test_the_built_in_model_is_the_same_from_the_cache_and_leaves_the_random_state_alone(digits_net):
    state = torch.get_rng_state()
    again = load_model("digits")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), digits_net.parameters(), strict=True))  # pyright: ignore


def test_a_damaged_cache_is_trained_anew(tmp_path, monkeypatch, digits_net):
    from rai_toolbox.robustness.models import _digits

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = _digits._cache_file(0)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"damaged")
    monkeypatch.setattr(_digits, "_EPOCHS", 1)
    load_model("digits")
    assert torch.load(cached, weights_only=True).keys() == digits_net.state_dict().keys()
