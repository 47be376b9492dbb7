"""The virtual environment of an engine: made once, continued if it was interrupted, left alone when it is right."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import pins
from .errors import ServeError
from .inside import compile_all, inspect, name_vllm, remove_half_installed
from .pip import Pip
from .plan import intruders, is_cpu_build, pinned_for_cpu, requirement_name, requirements_of, without_kept_out
from .processes import running
from .progress import Progress

RECORD = "qwen3next.json"


@dataclass(frozen=True)
class Environment:
    """Where an engine is installed and for what: `path` is the virtual environment, `root` the project's checkout."""

    path: Path
    root: Path
    engine: pins.Engine
    device: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def log(self) -> Path:
        """Where everything that pip says goes."""
        return self.path.with_name(f"{self.path.name}-install.log")

    def origin(self) -> dict[str, str]:
        """What cannot be changed in a finished environment: if one differs, it is made anew."""
        return {
            "engine": requirement_name(self.engine.requirement(self.device)),
            "python": platform.python_version(),
            "path": str(self.path),
            "root": str(self.root),
        }

    def key(self) -> str:
        """A hash of all that decides what is installed; settings of linters and tests are not part of it."""
        told = tomllib.loads((self.root / "pyproject.toml").read_text())
        installed = [told.get("build-system"), told["project"], told.get("tool", {}).get("setuptools")]
        engine = [self.engine.requirement(self.device), self.engine.more(self.device), sorted(self.engine.kept_out)]
        wanted = [pins.STEPS, pins.TORCH_CPU, installed, engine, self._stand_ins_digest(), self.origin()]
        return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()

    def is_ready(self) -> bool:
        """True if it was finished with exactly these pins; reads one small file."""
        return self._record().get("key") == self.key() and self.python.exists()

    def prepare(self) -> bool:
        """Make it ready; False if it was already. Raises ServeError, one sentence, on the first step that fails."""
        if self.is_ready():
            return False
        with _alone(self.path.with_name(f"{self.path.name}.lock"), "building this environment"):
            if self.is_ready():
                return False
            self._make()
            self._write_record(self.key())
        return True

    def _record(self) -> dict[str, object]:
        try:
            content = json.loads((self.path / RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write_record(self, key: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f"{RECORD}.draft"
        draft.write_text(json.dumps({"origin": self.origin(), "key": key}, indent=1) + "\n")
        os.replace(draft, self.path / RECORD)

    def _make(self) -> None:
        record = self._record()
        if self.path.exists() and not record and any(self.path.iterdir()):
            raise ServeError(
                f"{self.path} exists but was not made by this project; move it away or name another in VENV=."
            )
        if record and record.get("origin") != self.origin():
            print(f"{self.path} was made for another engine, Python or folder; making it anew.", flush=True)
            shutil.rmtree(self.path)
            record = {}
        if record:
            print(f"{self.path} is unfinished or out of date; continuing it.", flush=True)
        where = "an NVIDIA GPU" if self.device == "gpu" else "a CPU"
        print(f"Preparing {self.path} for {self.engine.name} on {where} (log: {self.log})", flush=True)
        self._write_record(None)
        self._create()
        remove_half_installed(self.python)
        pip = Pip(self.python, self.log)
        if self.device == "cpu":
            self._install_torch_for_cpu(pip)
            self._install_for_cpu(pip)
        else:
            requirement = self.engine.requirement("gpu")
            more = self.engine.more("gpu")
            pip.install(f"Installing {requirement}", [requirement, *more, *self._project_requirements()])
        # A build writes into the checkout, which environments made side by side share.
        with _alone(self.root / ".venv" / "build.lock", "installing from this folder"):
            self._install_from_checkout(pip)
        self._check()
        with Progress("Compiling Python files") as step:
            compile_all(self.python, self.log, step)

    def _install_from_checkout(self, pip: Pip) -> None:
        pip.install("Installing this project", ["--no-deps", "--no-build-isolation", "--editable", str(self.root)])
        if stand_ins := self._stand_ins():
            options = ["--no-deps", "--no-build-isolation", str(stand_ins)]
            pip.install(f"Installing {pins.STAND_INS}, a test aid in place of its kernels", options)

    def _create(self) -> None:
        """The empty environment, with pip; also where Python comes without ensurepip (some Linux distributions)."""
        if Pip(self.python, self.log).works():
            return
        with Progress("Creating the virtual environment") as step:
            step.update("python -m venv")
            for options in (["--clear"], ["--clear", "--without-pip"]):
                with running([sys.executable, "-m", "venv", *options, self.path], self.log) as process:
                    made = process.wait() == 0
                self._write_record(None)  # --clear emptied the folder, and with it the mark that it is ours
                if made:
                    break
            else:
                raise ServeError("Python could not create a virtual environment.", self.log)
        pip = Pip(self.python, self.log)
        if not pip.works():
            pip.install_itself()

    def _project_requirements(self) -> list[str]:
        """What the project and its tests require, read from pyproject.toml."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
        return [line for line in wanted if requirement_name(line) != project["name"]]

    def _install_torch_for_cpu(self, pip: Pip) -> None:
        """The CPU build of torch, from the configured index or else PyTorch's own; never anything else."""
        if inspect(self.python).get("torch") == pins.TORCH_CPU:
            return
        wish = f"torch=={pins.TORCH_CPU}"
        index = os.environ.get("TORCH_CPU_INDEX") or pins.TORCH_CPU_INDEX
        for options in ([], ["--index-url", index, "--retries", "1"]):
            place = "PyTorch's CPU index" if options else "the configured index"
            found = pip.find(f"Looking for {wish} at {place}", [*options, "--no-deps", "--ignore-installed", wish])
            if is_cpu_build(found):
                pip.install(f"Installing {wish}", [*options, "--no-deps", wish])
                return
        raise ServeError(
            f"The CPU build {wish} is neither at pip's configured index nor at {index}; "
            "name an index that has it in TORCH_CPU_INDEX=.",
            self.log,
        )

    def _install_for_cpu(self, pip: Pip) -> None:
        """The engine without what exists only for CUDA: its requirements are resolved here and installed as pins."""
        engine = self.engine.requirement("cpu")
        own = pip.report(f"Reading what {engine} requires", ["--no-deps", "--ignore-installed", engine])
        wanted = without_kept_out(requirements_of(own, requirement_name(engine)), self.engine)
        # torch is there already; naming it keeps pip from choosing another one, and brings in what torch requires.
        wanted += [*self.engine.more("cpu"), f"torch=={pins.TORCH_CPU}", *self._project_requirements()]
        report = pip.report("Choosing versions", wanted)
        chosen = pinned_for_cpu(report, self.engine)
        pip.install(f"Installing {engine} and {len(chosen)} packages", ["--no-deps", engine, *chosen])
        if self.engine.product == "vllm":
            name_vllm(self.python)

    def _stand_ins(self) -> Path | None:
        """The folder of what is installed in place of the engine's kernels on this device; None if nothing is."""
        folder = self.engine.stand_ins if self.device == "cpu" else None
        return self.root / folder if folder else None

    def _stand_ins_digest(self) -> str:
        """A hash of their files: they are installed as a copy, and an environment with an old one is out of date."""
        digest = hashlib.sha256()
        if folder := self._stand_ins():
            for path in sorted([*folder.rglob("*.py"), *folder.glob("*.pth"), *folder.glob("*.toml")]):
                if "build" not in path.relative_to(folder).parts:
                    digest.update(path.read_bytes())
        return digest.hexdigest()

    def _check(self) -> None:
        """Look at what is really there."""
        installed = inspect(self.python)
        advice = "remove that folder and try again"
        wanted = [requirement_name(self.engine.requirement(self.device)), "qwen3next-plugin", "torch"]
        for name in [*wanted, *([pins.STAND_INS] if self._stand_ins() else [])]:
            if name not in installed:
                raise ServeError(f"pip finished, but {name} is not in {self.path}; {advice}.")
        if self.device == "cpu" and (wrong := intruders(installed, pins.TORCH_CPU)):
            raise ServeError(f"{self.path} is for a CPU but holds {', '.join(wrong)}; {advice}.")


@contextmanager
def _alone(lock: Path, doing: str) -> Iterator[None]:
    """Of two `make` at once, the second waits here for the first."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another make is {doing}; waiting for it.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
