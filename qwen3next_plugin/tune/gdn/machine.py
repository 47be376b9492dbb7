"""How long a candidate takes for a shape on this GPU, and whether what it gives is right.

Inputs, rotation through copies and the reference are those of `qwen3next bench kernels`: a layer between its
projections. Decodes and verifications are timed in CUDA graphs, as engines run them; prefills as Python launches them,
so that an engine's function of many launches counts what it takes the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen3next_plugin.bench.kernels.cases import Case
from qwen3next_plugin.bench.kernels.gdn_work import (
    CHECKED_ROWS,
    GdnInputs,
    gdn_work,
    run_decode,
    run_prefill,
    run_verify,
)
from qwen3next_plugin.bench.kernels.timing import EagerTimer, GraphTimer
from qwen3next_plugin.bench.kernels.work import Call, Engine, Prepared, Work
from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn import config, peers
from qwen3next_plugin.kernels.gdn.table import OWN, DecodeTile, OwnPrefill, PrefillRule, PrefillWay, VerifyTile
from qwen3next_plugin.spec import Qwen3NextSpec

from ..cuda import refused
from ..measuring import TrialError
from .space import Candidate, Heads, Operation, Shape

_NOT_TIMED = ("choices.py", "config.py", "config_file.py")
_PLAIN: dict[Operation, Candidate] = {
    "prefill": PrefillWay(OWN, OwnPrefill()),
    "decode": DecodeTile(None, 16),
    "verify": VerifyTile(128, 16),
}
"""What the states (of a verification: the records) of other candidates are compared with."""


def gdn_files() -> list[Path]:
    """The sources of what is timed: the layer between its projections, and how its inputs are made."""
    folder = Path(gdn.__file__).resolve().parent
    names = ("gdn", "conv", "norm")
    return [path for name in names for path in (folder.parent / name).glob("*.py") if path.name not in _NOT_TIMED]


def with_heads(spec: Qwen3NextSpec, heads: Heads) -> Qwen3NextSpec:
    """The model as one rank of so many heads has it."""
    return replace(spec, gdn=replace(spec.gdn, num_k_heads=heads.keys, num_v_heads=heads.values))


class CudaGdnMachine:
    """The present GPU; on a CPU only `error` works. ``spec`` has the heads of one rank.

    What ``offer`` offers is tried at once: peers holds what ran and agreed with our own kernels, missing why the
    others did not.
    """

    def __init__(self, spec: Qwen3NextSpec, engine: str, device: torch.device, offer: Callable[[], None]) -> None:
        self.spec, self.device = spec, device
        self.layout: Engine = "sglang" if engine == "sglang" else "vllm"
        self.table = config.table_of(device)
        sizes = spec.gdn
        heads = (sizes.num_k_heads, sizes.num_v_heads, sizes.head_k_dim, sizes.head_v_dim)
        shape = peers.HeadShape(*heads, torch.bfloat16)
        offer()
        own = self.table.prefill[-1]
        every = tuple(PrefillRule(PrefillWay(name), 0, 0, "to be measured") for name in peers.OFFERS.found)
        with config.forced(replace(self.table, prefill=(*every, own))):
            peers.try_offers(shape, device)
        tried = {name for name, (heads, _) in peers.OFFERS.tried if heads == shape}
        self.peers, self.missing = tuple(sorted(tried)), dict(peers.OFFERS.missing)
        self.shape: Shape | None = None
        self.work: Work | None = None
        self.calls: list[Call] = []
        self.leaves: Callable[[], list[Tensor]] = list
        self.plain: list[Tensor] | None = None

    def _prepare(self, shape: Shape) -> Work:
        """Inputs for the shape; those of another are given up first."""
        if self.work is not None and shape == self.shape:
            return self.work
        self.work, self.calls, self.plain, self.leaves = None, [], None, list
        variant = "" if shape.state_bytes == 4 else "-bf16state"
        case = Case(str(shape), f"gdn-{shape.op}", shape.rows, shape.tokens, variant)
        work = gdn_work(case, self.spec, self.layout, self.device)
        about, copies = work.about, work.inputs
        first: GdnInputs = copies[0]
        own = about.slots[:CHECKED_ROWS, 0].long()
        self.leaves = lambda: [first.ssm_state[own], first.conv_state[own]]
        if shape.op == "prefill":
            call = partial(run_prefill, about, about.prefill_rows(packed=True))
        elif shape.op == "decode":
            call = partial(run_decode, about)
        else:
            record = about.records()
            call = partial(run_verify, about, record)
            self.leaves = lambda: [part[0, :CHECKED_ROWS].clone() for part in record.tensors()]
        self.shape, self.work, self.calls = shape, work, [partial(call, one) for one in copies]
        return work

    def once(self, shape: Shape, candidate: Candidate) -> Callable[[], object]:
        """The first copy's call."""
        self._prepare(shape)

        def call() -> Tensor:
            with torch.no_grad(), config.forced(config.only(self.table, candidate)):
                return self.calls[0]()

        return call

    def seconds(self, shape: Shape, candidate: Candidate) -> float:
        """The shortest mean over all copies among some repeats: what disturbs a GPU only ever adds time."""
        if isinstance(candidate, PrefillWay) and candidate.runs not in (OWN, *self.peers):
            raise TrialError(self.missing.get(candidate.runs, "not offered here"))
        try:
            with torch.no_grad(), config.forced(config.only(self.table, candidate)):
                self._prepare(shape)
                times = (EagerTimer() if shape.op == "prefill" else GraphTimer())(self.calls)
                if shape.op != "prefill" and times.how != "graph":
                    raise RuntimeError("it cannot be captured in a CUDA graph")
                return min(times.seconds)
        except Exception as error:
            raise refused(error, self.device) from None

    def error(self, shape: Shape, candidate: Candidate) -> float:
        """The larger of the first output's, against float64, and of what is left's, against our plainest kernel's."""
        try:
            with torch.no_grad():
                work = self._prepare(shape)
                if self.plain is None:
                    self.plain = self._left(work, _PLAIN[shape.op])
                with config.forced(config.only(self.table, candidate)):
                    output = work.error(Prepared(self.calls))
                left = self._left(work, candidate)
                return max(output, *(_relative(got, want) for got, want in zip(left, self.plain, strict=True)))
        except Exception as error:
            raise refused(error, self.device) from None

    def _left(self, work: Work, candidate: Candidate) -> list[Tensor]:
        work.restore()
        with config.forced(config.only(self.table, candidate)):
            self.calls[0]()
        return self.leaves()


def _relative(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    if not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
