"""Worst-case perturbations as components of MAITE. `rai_toolbox.robustness.evaluate` takes MAITE's as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rai_toolbox._extras import install_command

try:
    from maite.protocols import AugmentationMetadata, MetricMetadata
except ImportError as error:
    raise ImportError(f"rai_toolbox.maite needs MAITE: {install_command('maite')}") from error

from rai_toolbox import evaluating
from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._statistics import wilson_interval
from rai_toolbox.robustness.attack._inputs import nearest_errors, worst_inputs
from rai_toolbox.robustness.attack._settings import Norm, Settings, make_box
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.data._maite import label_of
from rai_toolbox.robustness.data._rows import ArrayRows
from rai_toolbox.robustness.data._samples import Samples, summarize
from rai_toolbox.robustness.models._load import Evaluated

if TYPE_CHECKING:
    import maite.protocols.image_classification as ic

__all__ = ["MinimumNorm", "RobustAccuracy", "WorstCase"]

Batch = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]

_FOUND = "rai_toolbox"  # the entry of a datum's metadata that holds what was found for it


@dataclass(eq=False)
class MinimumNorm:
    """An augmentation: each input becomes the nearest one that the module gets wrong.

    An input that is wrong from the start, or has no error that was found, stays as it is. The metadata of each datum
    gets an entry ``"rai_toolbox"`` with ``"norm"``, ``"epsilon"`` (None) and ``"distance"``: 0 where wrong from the
    start, infinite where nothing was found.

    Parameters
    ----------
    module : nn.Module
        The module that is attacked, from a batch of inputs to logits: the one that the MAITE model holds.
    bounds : (lower, upper) or None
        Where inputs lie, as ``(0, 1)`` for images; see `rai_toolbox.robustness.evaluate`.
    norm : str or number
        ``"l1"``, ``"l2"``, ``"linf"`` or ``"l0"``, or its order.
    steps, restarts : int, optional
        Of the solvers.
    seed : int
        All random choices follow from it and from the input itself: the batch does not matter.
    preprocess : callable, optional
        Applied to inputs before the module.

    Raises
    ------
    InputError
        If something given cannot be used, or a batch has inputs outside of the bounds.

    Examples
    --------
    >>> nearest = MinimumNorm(nn.Flatten(), bounds=None)
    >>> inputs, targets, metadata = nearest(([np.array([[[0.0, 3.0]]])], [[0, 1]], [{"id": "a"}]))
    >>> round(metadata[0]["rai_toolbox"]["distance"], 3)
    2.121
    """

    module: nn.Module = field(repr=False)
    _: KW_ONLY
    bounds: Any
    norm: str | float = "l2"
    steps: int | None = None
    restarts: int | None = None
    seed: int = 0
    preprocess: Callable[[Tensor], Tensor] | None = None
    metadata: AugmentationMetadata = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._settings = Settings.checked(norms=self.norm, steps=self.steps, restarts=self.restarts, seed=self.seed)
        self._norm: Norm = self._settings.norms[0]
        self._model = Evaluated(self.module, self.preprocess)
        self.metadata = AugmentationMetadata(id=f"rai_toolbox.MinimumNorm({self._norm})")

    def __call__(self, batch: Batch, /) -> Batch:
        """Return the batch with perturbed inputs, the same targets, and what was found in the metadata."""
        inputs, targets, metadata = batch
        subject = self._subject(inputs, targets)
        with evaluating(*subject.modules), torch.random.fork_rng(devices=[]):
            perturbed, distance = self._perturb(subject)
        radius = getattr(self, "epsilon", None)
        found = [{"norm": self._norm, "epsilon": radius, "distance": away} for away in distance.tolist()]
        return (
            [_alike(one, original) for one, original in zip(perturbed.cpu(), inputs, strict=True)],
            targets,
            [{**entry, _FOUND: one} for entry, one in zip(metadata, found, strict=True)],
        )

    def _subject(self, inputs: Sequence[Any], targets: Sequence[Any]) -> Subject:
        x = np.stack([np.asarray(one.detach().cpu() if isinstance(one, Tensor) else one) for one in inputs])
        labels = np.array([label_of(target, "a target") for target in targets])
        samples = Samples(ArrayRows(x), labels)
        box = make_box(samples, summarize(samples, "classification"), self.bounds, None)
        device = next((part.device for part in self.module.parameters()), torch.device("cpu"))
        settings = replace(self._settings, batch_size=len(inputs))  # one batch, however large it is
        return Subject(self._model, samples, labels, box, settings, device)

    def _perturb(self, subject: Subject) -> tuple[Tensor, NDArray]:
        return nearest_errors(subject, self._norm, *subject.batch(0, len(subject.samples)))


@dataclass(eq=False, kw_only=True)
class WorstCase(MinimumNorm):
    """An augmentation: each input becomes the worst one within a radius.

    It does what `rai_toolbox.robustness.evaluate` does at one radius, and `RobustAccuracy` gives the same figure as
    ``evaluate(..., epsilons=[epsilon], average=0)``: a minimum-norm search, then the fixed-budget solver on what still
    stands. ``"distance"`` is infinite where neither found an error; the input is the worst that was seen then.

    Parameters
    ----------
    module, bounds, norm, steps, restarts, seed, preprocess
        As for `MinimumNorm`.
    epsilon : float
        The radius, in the units of the inputs.
    """

    epsilon: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epsilon = Settings.checked(norms=self.norm, epsilons=[self.epsilon]).epsilons[self._norm][0]
        self.metadata = AugmentationMetadata(id=f"rai_toolbox.WorstCase({self._norm}, {self.epsilon:g})")

    def _perturb(self, subject: Subject) -> tuple[Tensor, NDArray]:
        return worst_inputs(subject, self._norm, self.epsilon, *subject.batch(0, len(subject.samples)))


class RobustAccuracy:
    """A metric: the share of predictions that are right, with its 95 % (Wilson) interval.

    Of inputs that `WorstCase` has changed it is the robust accuracy at that radius: an upper bound.

    Parameters
    ----------
    epsilons : sequence of float
        Radii at which `MinimumNorm`'s distances tell the accuracy: the curve of one pass. Other inputs are refused.
    """

    def __init__(self, epsilons: Sequence[float] = ()) -> None:
        self.metadata = MetricMetadata(id="rai_toolbox.RobustAccuracy")
        self._epsilons = tuple(map(float, epsilons))
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._right: list[bool] = []
        self._distance: list[float] = []

    def update(self, preds: Sequence[Any], targets: Sequence[Any], metadata: Sequence[Any], /) -> None:
        """Take in a batch of scores, of targets, shape (classes,) each, and of metadata."""
        for pred, target, entry in zip(preds, targets, metadata, strict=True):
            scores = np.asarray(pred.detach().cpu() if isinstance(pred, Tensor) else pred)
            label = label_of(target, "a target")
            self._right.append(bool(np.isfinite(scores).all()) and int(scores.argmax()) == label)
            found = entry.get(_FOUND, {})
            if self._epsilons and found.get("epsilon", 0) is not None:
                raise InputError("RobustAccuracy(epsilons) needs inputs of MinimumNorm, whose distances it reads")
            self._distance.append(found.get("distance", np.inf))

    def compute(self) -> Mapping[str, Any]:
        """Return ``robust_accuracy``, ``low``, ``high`` and ``samples``; the first three are lists for `epsilons`."""
        count = len(self._right)
        standing = [sum(away > epsilon for away in self._distance) for epsilon in self._epsilons]
        standing = standing or [sum(self._right)]
        ends = [wilson_interval(one, count) for one in standing]
        figures = [[one / max(1, count) for one in standing], *map(list, zip(*ends, strict=True))]
        shown = figures if self._epsilons else [values[0] for values in figures]
        return {**dict(zip(("robust_accuracy", "low", "high"), shown, strict=True)), "samples": count}


def _alike(perturbed: Tensor, original: Any) -> Any:
    """Return an input as the batch had it: a tensor on its device, or an array."""
    return perturbed.to(original.device) if isinstance(original, Tensor) else perturbed.numpy()


if TYPE_CHECKING:  # pyright sees here that these are what MAITE's protocols ask for

    def _components(module: nn.Module) -> tuple[ic.Augmentation, ic.Augmentation, ic.Metric]:
        return MinimumNorm(module, bounds=None), WorstCase(module, epsilon=1, bounds=None), RobustAccuracy()
