"""Files that are whole or not there."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` in one go, its folders made where missing. Raises SettingsError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)  # as other files are; temporary ones are the owner's alone
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}): give another --out.") from None


def check_writable(folder: Path) -> None:
    """Raise SettingsError now rather than after an hour of measuring if no file can be made in `folder`."""
    probe = folder / ".writable"
    write_atomically(probe, "")
    probe.unlink()


def as_text(content: dict[str, Any]) -> str:
    """JSON with one line an item of each list, which is how such files are read and compared."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            items = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f' "{key}": [\n{items}\n ]')
        else:
            parts.append(json.dumps({key: value}, indent=1)[2:-2])
    return "{\n" + ",\n".join(parts) + "\n}\n"
