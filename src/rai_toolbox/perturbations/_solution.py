"""The results of the solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """The result of a solver, one entry per datum.

    Attributes
    ----------
    perturbed : Tensor, shape (N, ...)
        As the data: shape, dtype, device.
    losses : Tensor, shape (N,)
        The criterion at `perturbed`.
    success : Tensor of bool, shape (N,)
        The decision is wrong (or, targeted, the target is reached) at `perturbed`.
    distances : Tensor of float64, shape (N,)
        The norm of `perturbed - data`, computed in float64 from the stored values. 0 where the decision was wrong
        from the start; from `minimum_norm`, infinite where no success was found.
    has_decision : bool
        The model decides something that a perturbation can change. False for floating-point targets without a margin:
        `success` is then False everywhere, and means nothing.
    """

    perturbed: Tensor
    losses: Tensor
    success: Tensor
    distances: Tensor
    has_decision: bool = True

    def robust_accuracy(self, epsilons: float | Sequence[float] | Tensor) -> Tensor:
        """The share of data whose decision no perturbation found changes within each radius.

        From `minimum_norm`, this is the whole curve of accuracy against epsilon. From `worst_case`, only the radius
        that it was run at (or a larger one) means anything.

        Parameters
        ----------
        epsilons : float, sequence of floats or Tensor, shape (...)

        Returns
        -------
        Tensor of float64, shape (...)

        Raises
        ------
        ValueError
            The targets were floating point and no margin was given: there is no decision to count.

        Examples
        --------
        >>> import torch
        >>> from rai_toolbox.perturbations import Solution
        >>> solution = Solution(
        ...     perturbed=torch.zeros(2, 3), losses=torch.zeros(2), success=torch.tensor([True, True]),
        ...     distances=torch.tensor([0.0, 0.3], dtype=torch.float64),
        ... )
        >>> solution.robust_accuracy([0.0, 0.2, 0.4])
        tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
        """
        if not self.has_decision:
            raise ValueError(
                "the targets were floating point, so there is no decision that could be right or wrong: give a "
                "classifier's targets as class indices (`target.argmax(1)` of one-hot rows), or give a `margin`"
            )
        radii = torch.as_tensor(epsilons, dtype=torch.float64, device=self.distances.device)
        beaten = self.success & (self.distances <= radii[..., None])
        return 1 - beaten.double().mean(dim=-1)


@dataclass(frozen=True)
class UniversalSolution:
    """The result of `universal`.

    Attributes
    ----------
    delta : Tensor, shape of one datum
        Add it to any datum (and clip to the bounds, if there are any).
    success_rate : float
        The share of the data whose decision is wrong (or, targeted, the target is reached) under `delta`.
    loss : float
        The mean of the criterion over the data under `delta`.
    distance : float
        The norm of `delta`, computed in float64.
    """

    delta: Tensor
    success_rate: float
    loss: float
    distance: float


def concatenate(parts: Sequence[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    return Solution(
        perturbed=torch.cat([part.perturbed for part in parts]),
        losses=torch.cat([part.losses for part in parts]),
        success=torch.cat([part.success for part in parts]),
        distances=torch.cat([part.distances for part in parts]),
        has_decision=all(part.has_decision for part in parts),
    )
