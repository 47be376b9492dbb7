"""Answers ``import sgl_kernel`` and ``import torchvision`` where nothing else does. Run at each start of Python (.pth).

The finder stands at the end of ``sys.meta_path``: a real package is always found before it. It imports nothing until
one of the names is asked for.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "sgl_kernel": "sgl_kernel",
    "sgl_kernel.mamba": "sgl_kernel",
    "torchvision": "torchvision",
    "torchvision.transforms": "torchvision",
    "torchvision.transforms.functional": "torchvision",
    "torchvision.transforms.v2": "torchvision",
    "torchvision.transforms.v2.functional": "torchvision",
    "torchvision.io": "torchvision",
    "torchvision.ops": "torchvision",
}
"""Imported name -> the module of this package that has its content."""


class _Content(Loader):
    """Fills a module with the names of one of this package's modules."""

    def __init__(self, source: str) -> None:
        self.source = source

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        """Raises ImportError, saying why, where the stand-ins must not be used."""
        from .guard import why_not

        if refusal := why_not():
            raise ImportError(refusal, name=module.__name__)
        content = vars(import_module(f".{self.source}", __package__))
        own = {"__getattr__", "__version__"}
        module.__dict__.update({name: value for name, value in content.items() if name in own or name[0] != "_"})


class StandInFinder(MetaPathFinder):
    """Finds the names in MODULES."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As Python's import system asks; None for every other name."""
        if name not in MODULES:
            return None
        return ModuleSpec(name, _Content(MODULES[name]), origin=f"stand-in: {__package__}", is_package=True)


def install() -> None:
    """Put one finder at the end of ``sys.meta_path``."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


install()
