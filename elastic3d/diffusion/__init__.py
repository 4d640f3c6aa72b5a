"""Flow matching: the path, the velocity and the sampler."""
