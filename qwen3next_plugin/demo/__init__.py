"""Checkpoints to serve: the shipped demo model, the script that trained it, and random weights of any shape."""

from .random import write_random_checkpoint

__all__ = ["write_random_checkpoint"]
