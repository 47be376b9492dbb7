"""pip of an environment, with progress the user can see and one sentence when it fails."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .errors import ServeError
from .plan import Report
from .processes import running
from .progress import Progress

_NOTHING: Report = {"install": []}
_STEP = re.compile(r"^\s*(?:Collecting|Downloading|Using cached|Processing|Installing collected packages:)\s*(\S*)")


class Pip:
    """pip as a child process: `python -I -m pip`, so that PYTHONPATH and user packages stay out; pip's own
    configuration (files, PIP_* variables) applies."""

    def __init__(self, python: Path, log: Path) -> None:
        self.python = python
        self.log = log

    def works(self) -> bool:
        """True if the interpreter is there and has pip."""
        try:
            asked = subprocess.run([self.python, "-I", "-m", "pip", "--version"], capture_output=True, timeout=120)
        except OSError:
            return False
        return asked.returncode == 0

    def install_itself(self) -> None:
        """Put pip into an environment made without it, by the pip of the Python that runs this."""
        with Progress("Installing pip") as step:
            command: list[str | Path] = [sys.executable, "-m", "pip", "--python", self.python, "install", "pip"]
            if not self._run(command, step):
                raise ServeError(f"{sys.executable} has no pip that could install pip into {self.python}.", self.log)

    def install(self, title: str, arguments: Sequence[str]) -> None:
        """`pip install …`; raises ServeError naming the log."""
        with Progress(title) as step:
            # --no-compile: `inside.compile_all` does that on all cores.
            if not self._run([*self._pip(), "install", "--no-compile", *arguments], step):
                raise ServeError(f"pip could not do this: {title}.", self.log)

    def report(self, title: str, arguments: Sequence[str]) -> Report:
        """What `pip install …` would install; nothing is installed. Raises ServeError if pip finds no answer."""
        report = self.find(title, arguments)
        if report is _NOTHING:
            raise ServeError(f"pip could not do this: {title}.", self.log)
        return report

    def find(self, title: str, arguments: Sequence[str]) -> Report:
        """As `report`, but an answer with nothing in it where pip finds none."""
        with tempfile.TemporaryDirectory() as folder, Progress(title) as step:
            file = Path(folder) / "report.json"
            command = [*self._pip(), "install", "--dry-run", "--report", file, *arguments]
            if not self._run(command, step):
                return _NOTHING
            answer: Report = json.loads(file.read_text())
            return answer

    def _pip(self) -> list[str | Path]:
        options = ["--no-input", "--disable-pip-version-check", "--no-color"]
        return [self.python, "-I", "-m", "pip", *options]

    def _run(self, command: Sequence[str | Path], step: Progress) -> bool:
        """Run to the end while `step` counts the packages that pip's output names; True if it succeeded."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        seen: set[str] = set()
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            start = log.tell()
        with running(command, self.log) as process, self.log.open(errors="replace") as output:
            output.seek(start)
            while process.poll() is None:
                for line in output:
                    if found := _STEP.match(line):
                        seen.add(found.group(1))
                step.update(f"{len(seen)} packages seen" if seen else "", counts=True)
                time.sleep(0.2)
            return process.returncode == 0
