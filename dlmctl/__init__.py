"""dlmctl: post-training of diffusion language models as Unix pipes."""

__version__ = "0.1.0"
