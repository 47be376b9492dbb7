"""Work for when a module of an engine is imported, and none in processes that never import it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Call ``action`` once the module has been executed: at once if it has been, or else at the end of its import.

    What ``action`` raises then fails the import. Finding the module without importing it does nothing.
    """
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(module, action))


class _Watcher(MetaPathFinder):
    """Finds one module where the finders behind this one do, and adds an action to its execution."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                self.action()

            # On this one loader object, which stays of the class that users of the module's loader expect.
            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
