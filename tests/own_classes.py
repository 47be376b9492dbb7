"""The classes of an integration, for tests that walk what they derive from."""

import inspect
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def own_classes(package: ModuleType) -> list[type]:
    """Every class that a module of the package defines."""
    modules = [f"{package.__name__}.{module.name}" for module in iter_modules(package.__path__)]
    return [
        item
        for name in modules
        for _, item in inspect.getmembers(import_module(name), inspect.isclass)
        if item.__module__ == name
    ]


def assert_none_derives_from(package: ModuleType, foreign: tuple[str, ...]) -> None:
    """Fails for a class with a base whose module's name begins with one of `foreign`."""
    classes = own_classes(package)
    assert len(classes) > 8
    for item in classes:
        for base in item.__mro__:
            assert not base.__module__.startswith(foreign), f"{item} derives from {base}"
