"""ardiff: training and sampling of asynchronous video diffusion models."""

__version__ = "0.1.0"
