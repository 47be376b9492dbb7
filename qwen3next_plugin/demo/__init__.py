"""Checkpoints to serve: the shipped demo model, the script that trained it, and random weights of any shape."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .random import write_random_checkpoint

__all__ = ["write_random_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import torch only for those who want weights: the command line's help does not."""
    if name == "write_random_checkpoint":
        from .random import write_random_checkpoint

        return write_random_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
