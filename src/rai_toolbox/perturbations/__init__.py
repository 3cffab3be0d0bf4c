"""Models of a perturbation, random initializers, and solvers that find the worst perturbation."""

from rai_toolbox.perturbations.init import uniform_like_l1_n_ball_, uniform_like_l2_n_ball_, uniform_like_linf_n_ball_
from rai_toolbox.perturbations.models import (
    AdditivePerturbation,
    MultiplicativePerturbation,
    PerturbationModel,
    ShiftPerturbation,
)
from rai_toolbox.perturbations.solvers import (
    Solution,
    UniversalSolution,
    gradient_ascent,
    minimum_norm,
    random_restart,
    universal,
    worst_case,
)

__all__ = [
    "AdditivePerturbation",
    "MultiplicativePerturbation",
    "PerturbationModel",
    "ShiftPerturbation",
    "Solution",
    "UniversalSolution",
    "gradient_ascent",
    "minimum_norm",
    "random_restart",
    "uniform_like_l1_n_ball_",
    "uniform_like_l2_n_ball_",
    "uniform_like_linf_n_ball_",
    "universal",
    "worst_case",
]
