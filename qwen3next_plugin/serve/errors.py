"""What stops `make serve`."""

from pathlib import Path

from ..errors import PluginError

LINES_SHOWN = 25


class ServeError(PluginError):
    """A step of `make serve` failed: one sentence for the user, and where to read more.

    `log` names the file whose end explains the failure, when there is one. Its end is kept here as it is now: what is
    still running is stopped after this, and has its own last words.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.last_lines = [] if log is None else _last_lines(log)


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
    except OSError:
        return []
