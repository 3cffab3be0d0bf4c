"""Settings, radii, and the computations on one batch of samples."""
