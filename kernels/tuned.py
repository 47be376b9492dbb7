"""What tables that a tuner writes have in common, whichever operation they are for."""

from collections.abc import Callable
from pathlib import Path


def checked_folder(folder: Path, files: str, read: Callable[[Path], object], command: str) -> Path:
    """``folder``, after each of its ``files`` (a pattern) was read: a damaged one is told of at start.

    command: what writes such a folder. Raises ValueError where there is no such folder; what ``read`` raises passes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the one that `{command}` wrote to")
    for path in sorted(folder.glob(files)):
        read(path)
    return folder
