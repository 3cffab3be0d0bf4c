"""Optimizers that wrap an optimizer: they change gradients before its step and parameters after it."""

from rai_toolbox.optim._averaged import AveragedGradientOptim
from rai_toolbox.optim._chain import ChainedParamTransformingOptimizer
from rai_toolbox.optim._clamped import ClampedGradientOptimizer, ClampedParameterOptimizer
from rai_toolbox.optim._frank_wolfe import L1FrankWolfe, L1qFrankWolfe, L2FrankWolfe, LinfFrankWolfe
from rai_toolbox.optim._frank_wolfe_step import FrankWolfe
from rai_toolbox.optim._joint import JointOptimizer
from rai_toolbox.optim._normed import (
    L1NormedGradientOptim,
    L2NormedGradientOptim,
    LpNormedGradientOptim,
    SignedGradientOptim,
)
from rai_toolbox.optim._projected import (
    L1BallOptim,
    L1ProjectedOptim,
    L2BallOptim,
    L2ProjectedOptim,
    LinfBallOptim,
    LinfProjectedOptim,
    SimplexOptim,
)
from rai_toolbox.optim._random import independent_draws
from rai_toolbox.optim._sparse import L1qNormedGradientOptim, TopQGradientOptimizer
from rai_toolbox.optim._spectral import (
    OrthogonalizedGradientOptim,
    SpectralBallOptim,
    SpectralFrankWolfe,
    SphereOptim,
    StiefelOptim,
)
from rai_toolbox.optim._wrapper import ParamTransformingOptimizer

__all__ = [
    "AveragedGradientOptim",
    "ChainedParamTransformingOptimizer",
    "ClampedGradientOptimizer",
    "ClampedParameterOptimizer",
    "FrankWolfe",
    "JointOptimizer",
    "L1BallOptim",
    "L1FrankWolfe",
    "L1NormedGradientOptim",
    "L1ProjectedOptim",
    "L1qFrankWolfe",
    "L1qNormedGradientOptim",
    "L2BallOptim",
    "L2FrankWolfe",
    "L2NormedGradientOptim",
    "L2ProjectedOptim",
    "LinfBallOptim",
    "LinfFrankWolfe",
    "LinfProjectedOptim",
    "LpNormedGradientOptim",
    "OrthogonalizedGradientOptim",
    "ParamTransformingOptimizer",
    "SignedGradientOptim",
    "SimplexOptim",
    "SpectralBallOptim",
    "SpectralFrankWolfe",
    "SphereOptim",
    "StiefelOptim",
    "TopQGradientOptimizer",
    "independent_draws",
]
