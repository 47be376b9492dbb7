"""A whole run: visits in their order, rows within a visit, repeats within a row; the state is saved after each."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3next_plugin.config import load_spec

from .client import BenchError
from .engines import EngineSetup, Limits, command_of, environment_of, told
from .logits import relative_logit_error
from .measure import count_experts, decode_length, measure
from .profile import read_trace, summarize
from .rows import PROMPT_TOKENS, Engine, Row, Side, Visit
from .server import Server, free_port, serving
from .state import State, complete_rows, left_to_do, repeats_wanted, told_by

Oracle = NDArray[np.float32] | None


@dataclass
class Bench:
    """Everything a run needs to know."""

    model: Path
    visits: list[Visit]
    setups: Mapping[Engine, EngineSetup]
    state: State
    work: Path
    repeats: int = 3
    steps: int = 64
    start_seconds: float = 1800.0
    evidence: bool = True  # compare logits with the oracle's
    deadline: float | None = None  # time.monotonic() after which nothing new is begun
    tick: Callable[[str, float | None], None] = lambda text, seconds_left: None
    saved: Callable[[], None] = lambda: None
    seconds_of: dict[str, float] = field(default_factory=dict)
    builders: dict[Engine, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self) -> bool:
        """Measures all that is left. Returns whether everything is there now (else the deadline came first)."""
        try:
            return self._run()
        finally:
            for builder in self.builders.values():
                builder.kill()
                builder.wait()

    def _run(self) -> bool:
        spec = load_spec(self.model)
        engines = list(dict.fromkeys(visit.side.engine for visit in self.visits))
        abouts = {engine: self._about(engine) for engine in engines}
        machine = next(iter(abouts.values()))["machine"]
        session = self.state.session(machine)
        for engine, about in abouts.items():
            session["about"].setdefault(engine, about)
        if left_to_do(session, self.visits, self.repeats) and not self._has("start"):
            self.builders = {engine: self._builder(engine, about) for engine, about in abouts.items()}
        oracle = self._oracle(engines[0]) if self.evidence else None
        self._save()
        others = [other for other in self.state.data["sessions"] if other is not session]
        timed: set[str] = set().union(*(complete_rows(other, self.visits, self.repeats) for other in others))
        for visit, rows in left_to_do(session, self.visits, self.repeats):
            wanted = [row for row in rows if visit.evidence or row.name not in timed]
            wanted = [row for row in wanted if not told_by(others, visit, row)]
            if not wanted:
                continue
            if self._late(self.seconds_of.get("start", 0.0)):
                return False
            if not self._visit(session, visit, wanted, spec.vocab_size, oracle):
                return False
        return True

    def _oracle(self, engine: Engine) -> Oracle:
        """The oracle's log-probabilities, made once a machine, while no engine holds the GPU."""
        file = _made(self.work) / "oracle.npy"
        if not file.exists():
            self.tick("asking the oracle", None)
            self._program(engine, "oracle", str(self.model), str(file))
        return np.load(file)

    def _program(self, engine: Engine, module: str, *arguments: str) -> str:
        """What a module of this package prints in the engine's environment. Raises BenchError if it fails."""
        setup = self.setups[engine]
        command = [setup.python, "-m", f"qwen3next_plugin.bench.{module}", *arguments]
        done = subprocess.run(command, env=setup.variables(), capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise BenchError(f"{engine}: `{module}` failed: {last}")
        return done.stdout

    def _builder(self, engine: Engine, about: dict[str, Any]) -> "subprocess.Popen[bytes]":
        """A process that fills the caches of an engine's visits with what takes a C++ compiler minutes."""
        setup, place = self.setups[engine], _made(self.work / "prebuild" / engine)
        environment = environment_of(Side(engine, False), setup, self._caches(Side(engine, False)), place)
        command = [setup.python, "-m", "qwen3next_plugin.bench.prebuild", engine, str(about["capability"])]
        with (place / "log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _caches(self, side: Side) -> Path:
        """Sides share what compilers made, unless their starts are to be measured."""
        return _made(self.work / "caches" / (side.name if self._has("start") else side.engine))

    def _about(self, engine: Engine) -> dict[str, Any]:
        """Ceilings and versions, from a process in the engine's environment."""
        self.tick(f"{engine}: measuring what the machine can do", None)
        return dict(json.loads(self._program(engine, "ceilings").splitlines()[-1]))

    def _limits(self) -> Limits:
        rows = [row for visit in self.visits for row in visit.rows]
        rows = [row.profiled if row.kind == "profile" else row for row in rows]
        requests = max([int(row.size) for row in rows if row.kind == "decode"] + [64 if self._has("traffic") else 1])
        decode = [PROMPT_TOKENS + decode_length(row, self.steps) for row in rows if row.kind == "decode"]
        prompts = [row.prompt_tokens + 128 for row in rows]
        return Limits(-(-max(decode + prompts + [256]) // 64) * 64, requests)

    def _has(self, kind: str) -> bool:
        return any(row.kind == kind for visit in self.visits for row in visit.rows)

    def _visit(
        self,
        session: dict[str, Any],
        visit: Visit,
        rows: list[Row],
        vocab_size: int,
        oracle: NDArray[np.float32] | None,
    ) -> bool:
        known = session["visits"].get(visit.name)
        work = self.work / visit.name
        record = Path(tempfile.mkdtemp(prefix="record-", dir=_made(work)))
        caches = self._caches(visit.side)
        if visit.cold and known is None and any(row.kind == "start" for row in rows):
            shutil.rmtree(caches, ignore_errors=True)
            _made(caches)
        setup, port, limits = self.setups[visit.side.engine], free_port(), self._limits()
        command = command_of(visit.side, setup, self.model, limits, port, eager=visit.evidence)
        environment = environment_of(visit.side, setup, caches, record, experts=visit.evidence)
        places = {str(self.model): "model", str(caches): "caches", str(record): "record"}
        seconds = self.start_seconds if self.deadline is None else self.deadline - time.monotonic()

        def tick(text: str) -> None:
            self.tick(f"{visit.name}: {text}", self._left(session))

        began = time.monotonic()
        with serving(command, environment, port, work / "server.log", record, seconds=seconds, tick=tick) as server:
            self.seconds_of["start"] = time.monotonic() - began
            if known is None:
                known = {
                    "side": visit.side.name,
                    "turn": visit.turn,
                    "cold": visit.cold,
                    "facts": server.facts,
                    **told(command, environment, places),
                    "rows": {},
                    "evidence": {},
                }
                session["visits"][visit.name] = known
            if oracle is not None and "relative_logit_error" not in known:
                tick("comparing logits with the oracle's")
                known["relative_logit_error"] = relative_logit_error(server.client, visit.side.engine, oracle)
            self._save()
            if (builder := self.builders.get(visit.side.engine)) is not None:
                builder.wait()  # nothing else runs while something is timed
            for row in rows:
                if visit.evidence:
                    tick(f"{row.name}: counting experts")
                    known["evidence"][row.name] = count_experts(server, row, limits.chunk, vocab_size)
                    self._save()
                elif not self._row(session, known, server, row, vocab_size, tick):
                    return False
        return True

    def _row(
        self,
        session: dict[str, Any],
        known: dict[str, Any],
        server: Server,
        row: Row,
        vocab_size: int,
        tick: Callable[[str], None],
    ) -> bool:
        repeats = known["rows"].setdefault(row.name, [])
        if row.kind == "prefill" and not repeats:
            tick(f"{row.name}: once without counting")
            measure(server, row, -1, self.steps, vocab_size)
        while len(repeats) < repeats_wanted(row, self.repeats):
            if self._late(self.seconds_of.get(row.name, 0.0)):
                return False
            tick(f"{row.name}: repeat {len(repeats) + 1} of {repeats_wanted(row, self.repeats)}")
            began = time.monotonic()
            found = measure(server, row, len(repeats), self.steps, vocab_size)
            if row.kind == "profile":
                layers = load_spec(self.model).num_layers
                found["profile"] = summarize(read_trace(Path(found.pop("trace"))), found["steps"], layers)
            repeats.append(found)
            if row.kind != "start":
                self.seconds_of[row.name] = time.monotonic() - began
            self._save()
        return True

    def _left(self, session: dict[str, Any]) -> float | None:
        """Seconds that what is left will take, going by what has been done; None while nothing has."""
        total = 0.0
        todo = left_to_do(session, self.visits, self.repeats)
        for visit, rows in todo:
            known = session["visits"].get(visit.name)
            if known is None:
                if "start" not in self.seconds_of:
                    return None
                total += self.seconds_of["start"]
            known_rows = [seconds for name, seconds in self.seconds_of.items() if name != "start"]
            mean = sum(known_rows) / max(len(known_rows), 1)
            for row in rows:
                done = 0 if known is None else len(known["rows"].get(row.name, ()))
                count = 1 if visit.evidence else repeats_wanted(row, self.repeats) - done
                total += count * self.seconds_of.get(row.name, mean) if row.kind != "start" else 0.0
        return total

    def _late(self, needed: float) -> bool:
        return self.deadline is not None and time.monotonic() + needed > self.deadline

    def _save(self) -> None:
        self.state.save()
        self.saved()


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
