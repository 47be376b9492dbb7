"""What stops `make serve`."""

from pathlib import Path

from ..errors import PluginError


class ServeError(PluginError):
    """A step of `make serve` failed: one sentence for the user, and where to read more.

    `log` names the file whose end explains the failure, when there is one.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
