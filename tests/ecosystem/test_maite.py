"""With the real MAITE: its datasets and models in our evaluation, our perturbations in its evaluation."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.cli import main
from rai_toolbox.robustness import InputError, evaluate

pytest.importorskip("maite", reason="needs MAITE: pip install '.[maite]'")

import maite.protocols.image_classification as ic
from maite.tasks import evaluate as maite_evaluate

from rai_toolbox.maite import MinimumNorm, RobustAccuracy, WorstCase

QUICK = {"steps": 10, "restarts": 2}
NAMES = {0: "cat", 1: "dog", 2: "fox"}


class Pictures:
    """A dataset by MAITE's protocol: pictures of 1×4×4, three classes."""

    def __init__(self, x, y, names=NAMES):
        self.x, self.y = x, y
        self.metadata = {"id": "pictures", **({} if names is None else {"index2label": names})}

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index, /):
        return self.x[index], np.eye(3, dtype=np.float32)[self.y[index]], {"id": f"picture-{index}"}


class Classifier:
    """A model by MAITE's protocol, that holds a module."""

    def __init__(self, module, names=None, change=None):
        self.module = module
        self.change = change or (lambda x: x)
        self.metadata = {"id": "classifier", **({} if names is None else {"index2label": names})}

    def __call__(self, batch, /):
        x = self.change(torch.stack([torch.as_tensor(np.asarray(one)) for one in batch]))
        with torch.no_grad():
            return list(self.module(x).softmax(dim=1).numpy())


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)


@pytest.fixture(scope="module")
def data(module):
    x = np.random.default_rng(0).random((24, 1, 4, 4)).astype(np.float32)
    y = module(torch.from_numpy(x)).argmax(dim=1).numpy()
    y[::6] = (y[::6] + 1) % 3  # some are wrong from the start
    return Pictures(x, y)


def test_components_satisfy_the_protocols_at_run_time(module, data):
    pytest.importorskip("beartype", reason="needs beartype: pip install 'maite[experimental]'")
    from maite.spotcheck import SpotcheckError, spotcheck, spotcheck_component

    nearest = MinimumNorm(module, bounds=(0, 1), **QUICK)
    worst = WorstCase(module, epsilon=0.1, bounds=(0, 1), **QUICK)
    metric = RobustAccuracy()
    for component in (nearest, worst):
        assert isinstance(component, ic.Augmentation)
        checked = spotcheck_component(ic.Augmentation)(component)
        checked(([data[0][0]], [data[0][1]], [data[0][2]]))
    assert isinstance(metric, ic.Metric)
    assert isinstance(data, ic.Dataset)
    assert isinstance(Classifier(module), ic.Model)
    checked_task = spotcheck(maite_evaluate, ai_problem="image_classification")
    figures, _, _ = checked_task(
        model=Classifier(module), dataset=data, augmentation=worst, metric=metric, batch_size=12
    )
    assert figures["samples"] == 24
    # The check has teeth: a flat picture is none.
    flat = Pictures(data.x.reshape(24, 16), data.y)
    with pytest.raises(SpotcheckError):
        spotcheck_component(ic.Dataset)(flat)[0]


@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_maites_evaluation_gives_our_figure_exactly_in_batches_of_any_size(module, data, norm):
    epsilon = {"l2": 0.15, "linf": 0.05, "l0": 1}[norm]
    ours = evaluate(
        module, (data.x, data.y), norms=norm, epsilons=[epsilon], bounds=(0, 1), diagnostics=False, average=0, **QUICK
    )
    point = ours.curves[norm].at(epsilon)
    assert 0.1 < point.value < ours.curves[norm].at(0).value
    for size in (1, 7, 24):
        worst = WorstCase(module, norm=norm, epsilon=epsilon, bounds=(0, 1), **QUICK)
        options = {"model": Classifier(module), "dataset": data, "batch_size": size}
        figures, _, ((*_,), *_) = maite_evaluate(
            **options, metric=RobustAccuracy(), augmentation=worst, return_augmented_data=True
        )
        assert figures == {"robust_accuracy": point.value, "low": point.low, "high": point.high, "samples": 24}
        nearest = MinimumNorm(module, norm=norm, bounds=(0, 1), **QUICK)
        curve, _, batches = maite_evaluate(
            **options, metric=RobustAccuracy([epsilon]), augmentation=nearest, return_augmented_data=True
        )
        assert curve["robust_accuracy"] == [point.by_minimum_norm]
        found = [entry["rai_toolbox"]["distance"] for _, _, metadata in batches for entry in metadata]
        assert found == pytest.approx(
            evaluate(
                module, (data.x, data.y), norms=norm, epsilons=[1e-6 if norm != "l0" else 1], bounds=(0, 1),
                diagnostics=False, average=0, **QUICK,
            ).distance[norm].tolist(),
            rel=1e-5,
        ) or norm == "l0"  # fmt: skip


def test_perturbed_inputs_lie_in_ball_and_bounds_and_come_back_as_they_were_given(module, data):
    worst = WorstCase(module, norm="linf", epsilon=0.1, bounds=(0, 1), **QUICK)
    before = [dict(entry) for entry in (data[i][2] for i in range(6))]
    arrays, targets, metadata = ([data[i][part] for i in range(6)] for part in range(3))
    module.train()
    changed, same, told = worst((arrays, targets, metadata))
    assert module.training  # the module is left as it was
    module.eval()
    assert same is targets
    assert metadata == before
    for one, original, entry in zip(changed, arrays, told, strict=True):
        assert isinstance(one, np.ndarray)
        assert np.abs(one - original).max() <= 0.1 + 1e-7
        assert one.min() >= 0
        assert one.max() <= 1
        assert entry["id"].startswith("picture-")
        assert entry["rai_toolbox"]["epsilon"] == 0.1
    tensors, _, _ = worst(([torch.from_numpy(one) for one in arrays], targets, metadata))
    assert all(isinstance(one, torch.Tensor) for one in tensors)
    assert np.array_equal(torch.stack(tensors).numpy(), np.stack(changed))


def table(folder):
    """The rows of samples.csv."""
    return list(csv.DictReader((folder / "samples.csv").read_text("utf-8").splitlines()))


def test_ids_and_labels_go_through_to_samples_csv(module, data, tmp_path):
    result = evaluate(Classifier(module), data, epsilons=[0.1], diagnostics=False, **QUICK)
    same = evaluate(module, (data.x, data.y), epsilons=[0.1], diagnostics=False, **QUICK)
    assert result.curves["l2"].points == same.curves["l2"].points
    assert result.class_names == ("cat", "dog", "fox")
    assert (result.settings["model"], result.settings["data"]) == ("classifier", "pictures")
    assert result.curves["l2"].classes[0].name == "cat"
    rows = table(result.save(tmp_path))
    assert [row["id"] for row in rows] == [f"picture-{index}" for index in range(24)]
    assert [row["label_name"] for row in rows] == [NAMES[label] for label in data.y.tolist()]
    assert [row["prediction_name"] for row in rows] == [NAMES[one] for one in result.prediction.tolist()]
    again = type(result).load(tmp_path)
    assert again.ids == result.ids
    assert again.to_pandas()["id"].tolist() == list(result.ids)
    named = evaluate(
        Classifier(module, NAMES), Pictures(data.x, data.y, None), epsilons=[0.1], diagnostics=False, **QUICK
    )
    assert named.class_names == ("cat", "dog", "fox")


def test_the_command_takes_maites_components(data, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(module.state_dict(), "weights.pt")
    np.savez("data.npz", x=data.x, y=data.y)
    here = Path(__file__).parent
    Path("own.py").write_text(
        f"import sys; sys.path.insert(0, {str(here)!r})\n"
        "import numpy as np, torch\nfrom torch import nn\nfrom test_maite import Classifier, Pictures\n"
        "def model():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))\n"
        "    net.load_state_dict(torch.load('weights.pt'))\n"
        "    return Classifier(net)\n"
        "def data():\n"
        "    with np.load('data.npz') as file:\n"
        "        return Pictures(file['x'], file['y'])\n"
    )
    words = ["--model", "own.py:model", "--data", "own.py:data", "--samples", "9", "--no-diagnostics", "--quiet"]
    assert main(["evaluate", *words, "--steps", "3", "--restarts", "1", "--epsilons", "0.1"]) == 0
    rows = table(Path("rai-report"))
    assert [row["id"] for row in rows] == [f"picture-{index}" for index in range(9)]


def scaled(x):
    return 1 - 2 * x


def test_a_model_that_answers_otherwise_than_its_module_is_refused(module, data):
    options = {"epsilons": [0.1], "diagnostics": False, "average": 0, **QUICK}
    with pytest.raises(InputError, match="rank the classes differently: does it change its inputs first"):
        evaluate(Classifier(module, change=scaled), data, **options)
    result = evaluate(Classifier(module, change=scaled), data, preprocess=scaled, **options)
    assert result.complete
    with pytest.raises(InputError, match=r"class 0 is 'cat' in the index2label of the data and 'dog' in that of the"):
        evaluate(Classifier(module, {0: "dog", 1: "cat", 2: "fox"}), data, **options)

    empty, several = Classifier(None), Classifier(None)
    several.first, several.second = module, nn.Identity()
    with pytest.raises(InputError, match="holds none: give the module itself"):
        evaluate(empty, data, **options)
    with pytest.raises(InputError, match="holds several, first, second: give the module itself"):
        evaluate(several, data, **options)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (np.array(1), r"the target of sample 0 has shape \(\)"),
        (np.ones(3), "has no largest entry of its own"),
        (np.ones((2, 3)), "expected numbers of shape"),
    ],
)
def test_a_target_that_names_no_class_is_told(module, data, target, said):
    class Strange(Pictures):
        def __getitem__(self, index, /):
            return self.x[index], target, {"id": index}

    with pytest.raises(InputError, match=said):
        evaluate(module, Strange(data.x, data.y), epsilons=[0.1], **QUICK)


def test_a_metric_at_radii_needs_the_nearest_errors(module, data):
    worst = WorstCase(module, epsilon=0.1, bounds=(0, 1), **QUICK)
    for augmentation in (worst, None):
        with pytest.raises(InputError, match="needs inputs of MinimumNorm"):
            maite_evaluate(
                model=Classifier(module), dataset=data, metric=RobustAccuracy([0.1]), augmentation=augmentation
            )
    plain, _, _ = maite_evaluate(model=Classifier(module), dataset=data, metric=RobustAccuracy())
    assert plain["robust_accuracy"] == 20 / 24
    with pytest.raises(InputError, match="outside the bounds"):
        WorstCase(module, epsilon=0.1, bounds=(0, 0.5))(tuple([data[0][part]] for part in range(3)))
    with pytest.raises(InputError, match="epsilons"):
        WorstCase(module, epsilon=-1, bounds=None)


def test_every_entry_point_names_a_component_of_its_protocol():
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    groups = {name: group for name, group in content["project"]["entry-points"].items() if name.startswith("maite.")}
    assert groups
    for group, points in groups.items():
        assert getattr(ic, group.rpartition(".")[2])
        for word in points.values():
            where, _, name = word.partition(":")
            assert name in import_module(where).__all__


def test_without_maite_one_line_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "maite", None)
    monkeypatch.setitem(sys.modules, "maite.protocols", None)
    monkeypatch.delitem(sys.modules, "rai_toolbox.maite")
    with pytest.raises(
        ImportError, match=r"^rai_toolbox.maite needs MAITE: in a clone of this project, pip install '\.\[maite\]'$"
    ):
        import_module("rai_toolbox.maite")
