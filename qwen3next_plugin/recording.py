"""What an engine did, written by its own processes while they work: the clock of `qwen3next bench`.

`QWEN3NEXT_RECORD=DIR` turns it on for stock and plugin alike. Every engine process writes files of its own below DIR:

- ``steps-PID.txt``, a line a step: ``time requests tokens most``, the moment the step's tokens were on the host
  (nanoseconds of `time.perf_counter_ns`, which processes of one machine share), requests in the step, tokens they had
  computed, and the most tokens of one request. ``most`` is 1 (or 1 + drafts) exactly when nobody's prompt was computed;
- ``experts-PID.txt``, only with ``QWEN3NEXT_RECORD_EXPERTS=1`` (which wants an engine without graphs or compilation), a
  line a forward pass: ``tokens distinct ...``, the number of distinct experts that the pass touched in each layer;
- ``facts-PID.json``: what the engine made of its flags.

A file ``profile-request.json`` put there (requests, steps, trace) makes the process that steps profile its GPU work.
"""

import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import nn

_ROUTER = ".mlp.gate"
PROFILE_REQUEST = "profile-request.json"


class Recorder:
    """Appends to this process's files below ``directory``, which is made if it is not there."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._files: dict[str, TextIO] = {}
        self._facts: dict[str, Any] = {}
        self._request = directory / PROFILE_REQUEST
        self._profiling: _Profiling | None = None

    def step(self, requests: int, tokens: int, most: int) -> None:
        """One step's tokens have arrived."""
        print(time.perf_counter_ns(), requests, tokens, most, file=self._file("steps"))
        if self._profiling is not None or os.path.exists(self._request):
            self._profile(requests, tokens)

    def facts(self, **facts: Any) -> None:
        """Adds to what is known of the engine; values that JSON has no word for are written as text."""
        self._facts |= facts
        path = self.directory / f"facts-{os.getpid()}.json"
        path.write_text(json.dumps(self._facts, indent=1, default=str), encoding="utf-8")

    def _profile(self, requests: int, tokens: int) -> None:
        """Follows the request that lies in the directory, from step to step; the trace is written where it says."""
        if self._profiling is None:
            self._profiling = _Profiling(**json.loads(self._request.read_text(encoding="utf-8")))
            self._request.unlink()
        if self._profiling.step(requests, tokens):
            self._profiling = None

    def watch_routers(self, model: "nn.Module", top_k: int) -> None:
        """Counts the distinct experts of every forward pass of the MoE layers of ``model``'s decoder.

        Looks at router logits [tokens, experts] as the modules named ``*.mlp.gate`` return them, alone or first in a
        tuple, so it works for any model of either engine. Waits for the GPU once a pass.
        """
        import torch

        routers = [module for name, module in model.named_modules() if name.endswith(_ROUTER) and "mtp" not in name]
        counts: list[torch.Tensor] = []
        last = routers[-1] if routers else None

        def look(module: "nn.Module", _: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            chosen = logits.float().topk(top_k, dim=-1).indices.flatten()
            counts.append(torch.zeros(logits.shape[-1], device=logits.device).index_fill_(0, chosen, 1).sum())
            if module is last:
                distinct = torch.stack(counts).int().tolist()
                counts.clear()
                print(logits.shape[0], *distinct, file=self._file("experts"))

        for router in routers:
            router.register_forward_hook(look)

    def _file(self, kind: str) -> TextIO:
        file = self._files.get(kind)
        if file is None:
            # Line-buffered: a step's line is on disk when the engine is killed; it costs 2 us.
            file = open(self.directory / f"{kind}-{os.getpid()}.txt", "a", buffering=1, encoding="ascii")  # noqa: SIM115
            self._files[kind] = file
        return file


class _Profiling:
    """The GPU work of ``steps`` steps of ``requests`` requests that decode, or, with 0 requests, of the next prompt."""

    def __init__(self, requests: int, steps: int, trace: str) -> None:
        self.requests, self.steps, self.trace = requests, steps, Path(trace)
        self.profiler: Any = None
        self.seen = 0

    def step(self, requests: int, tokens: int) -> bool:
        """Whether that was all. Called when a step has ended, so profiling begins and ends between steps."""
        if self.requests and not requests == tokens == self.requests:
            return self._stop() if self.profiler is not None else False
        if not self.requests and requests == tokens:
            # Not a prompt: an engine that overlaps steps still decodes for a request that has all of its tokens.
            if self.profiler is not None:
                self.profiler.stop()
                self._start()
            return False
        if self.profiler is None:
            self._start()
            return False
        self.seen += 1
        return self._stop() if self.seen >= self.steps else False

    def _start(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        cuda = torch.cuda.is_available()
        self.profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        self.profiler.start()

    def _stop(self) -> bool:
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.trace))
        done = self.trace.with_suffix(".done")
        done.write_text(str(self.seen), encoding="ascii")
        return True


_recorder_below = functools.cache(Recorder)  # one a directory


def recorder(environment: Mapping[str, str] | None = None) -> Recorder | None:
    """This process's recorder, or None if ``QWEN3NEXT_RECORD`` is not set."""
    directory = (os.environ if environment is None else environment).get("QWEN3NEXT_RECORD")
    if not directory:
        return None
    return _recorder_below(Path(directory))


def records_experts(environment: Mapping[str, str] | None = None) -> bool:
    """Whether distinct experts are to be counted."""
    return (os.environ if environment is None else environment).get("QWEN3NEXT_RECORD_EXPERTS") == "1"
