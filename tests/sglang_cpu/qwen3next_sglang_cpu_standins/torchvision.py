"""Content of the stand-in for ``torchvision``: names that SGLang imports and that text never calls."""

import enum
from collections.abc import Callable
from typing import Any

__version__ = "0.0.0"


class InterpolationMode(enum.Enum):
    """torchvision's names; processors of images have one as a default argument."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def __getattr__(name: str) -> Callable[..., Any]:
    """Any other name: fine to import, an error to call."""
    if name.startswith("_"):
        raise AttributeError(name)

    def missing(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"torchvision.{name} has no stand-in: images are not served in these tests")

    return missing
