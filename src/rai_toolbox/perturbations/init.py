"""Random initializers of perturbations, uniform in a ball."""

from rai_toolbox.functional._sampling import uniform_like_l1_n_ball_, uniform_like_l2_n_ball_, uniform_like_linf_n_ball_

__all__ = ["uniform_like_l1_n_ball_", "uniform_like_l2_n_ball_", "uniform_like_linf_n_ball_"]
