"""elastic3d: latent 3D generation with elastic diffusion transformers."""

__version__ = "0.1.0"
