"""Settings and radii, and what is computed for one batch of samples."""
