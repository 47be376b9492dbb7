"""The machine that measures Gated DeltaNet's kernels: offers, inputs, its check against the reference, on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qwen3next_plugin.bench.kernels.timing import Times
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gdn import config, peers
from qwen3next_plugin.kernels.gdn.config_file import read_file
from qwen3next_plugin.kernels.gdn.table import OWN, PROJECTED, DecodeTile, OwnPrefill, PrefillWay, VerifyTile
from qwen3next_plugin.tune import cuda
from qwen3next_plugin.tune.gdn import machine as machine_module
from qwen3next_plugin.tune.gdn.machine import CudaGdnMachine, gdn_files, with_heads
from qwen3next_plugin.tune.gdn.result import text_of
from qwen3next_plugin.tune.gdn.run import tune_gdn
from qwen3next_plugin.tune.gdn.search import ALLOWED_ERROR
from qwen3next_plugin.tune.gdn.space import EFFORTS, Candidate, Heads, Shape
from qwen3next_plugin.tune.measuring import GpuLostError, TrialError
from qwen3next_plugin.tune.session import About, Place
from tests.cpu.tune.fakes import H200
from tests.kernels.peer_case import delta_rule_rows

TINY = parse_config(config_of("tiny"))
CASES: list[tuple[Shape, Candidate]] = [
    (Shape("prefill", 1, 70), PrefillWay(OWN, OwnPrefill("blocks", walk_stages=3))),
    (Shape("prefill", 3, 20), PrefillWay(OWN, OwnPrefill())),
    (Shape("decode", 3, 1, 4), DecodeTile(64, 1)),
    (Shape("decode", 10, 1, 2), DecodeTile(None, 16)),
    (Shape("verify", 3, 2, 4), VerifyTile(8, 2)),
    (Shape("verify", 3, 3, 2), VerifyTile(4, 1)),
    (Shape("verify", 3, 2, 4), VerifyTile(32, 2, PROJECTED)),
    (Shape("verify", 3, 3, 2), VerifyTile(16, 1, PROJECTED)),
]


def nothing() -> None:
    """No engine offers anything."""


@pytest.fixture(autouse=True)
def _triton_runs() -> Iterator[None]:
    """Triton's version, under the interpreter where there is no GPU; no offers of others."""
    peers.OFFERS.withdraw_all()
    dispatch.prefer(dispatch.TRITON)
    yield
    dispatch.prefer(None)
    peers.OFFERS.withdraw_all()


@pytest.fixture
def machine(device: str) -> CudaGdnMachine:
    return CudaGdnMachine(TINY, "none", torch.device(device), nothing)


@pytest.mark.parametrize(("shape", "candidate"), CASES, ids=[f"{shape}, {text_of(way)}" for shape, way in CASES])
def test_right_kernels_pass(shape: Shape, candidate: Candidate, machine: CudaGdnMachine) -> None:
    assert machine.error(shape, candidate) < ALLOWED_ERROR[shape.op]


def test_the_kernels_over_tiles_pass(device: str) -> None:
    """They take heads of 64 and 128, which the tiny model has none of."""
    spec = with_heads(parse_config(config_of("80b")), Heads(1, 2))
    machine, shape = CudaGdnMachine(spec, "none", torch.device(device), nothing), Shape("prefill", 2, 70)
    way = PrefillWay(OWN, OwnPrefill("merging", 4, 168, 3))
    assert 0 < machine.error(shape, way) < ALLOWED_ERROR["prefill"]
    assert machine.error(shape, way) != machine.error(shape, PrefillWay(OWN, OwnPrefill())), "they ran"


@pytest.mark.parametrize("shape", [CASES[1][0], CASES[2][0], CASES[4][0]], ids=str)
def test_what_is_left_in_states_and_records_counts(
    shape: Shape, machine: CudaGdnMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs alone would not show a state that was stored wrongly."""
    plain = machine_module._PLAIN[shape.op]
    assert machine.error(shape, plain) < ALLOWED_ERROR[shape.op]
    leaves = machine.leaves
    monkeypatch.setattr(machine, "leaves", lambda: [1.5 * part for part in leaves()])
    assert machine.error(shape, plain) == pytest.approx(0.5, abs=0.01)


def test_a_candidate_is_what_runs(machine: CudaGdnMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    calls: Callable[..., Any] = config.decode_tile

    def noted(*arguments: Any) -> Any:
        seen.append(calls(*arguments))
        return seen[-1]

    from qwen3next_plugin.kernels.gdn import triton_decode

    monkeypatch.setattr(triton_decode, "decode_tile", noted)
    machine.error(Shape("decode", 2), DecodeTile(128, 2))
    assert set(seen) == {DecodeTile(128, 2), machine_module._PLAIN["decode"]}


def test_offers_are_tried_for_the_ranks_heads_and_what_fails_is_said(device: str) -> None:
    def offer() -> None:
        def fails(call: peers.PeerCall) -> Any:
            raise RuntimeError("no compiler")

        peers.OFFERS.offer(peers.Peer("fla", fails, log_decay=True, head_dim=TINY.gdn.head_k_dim))
        peers.OFFERS.say_missing("flashinfer", "cannot be imported")

    spec = with_heads(TINY, Heads(TINY.gdn.num_k_heads // 2, TINY.gdn.num_v_heads // 2))
    made = CudaGdnMachine(spec, "none", torch.device(device), offer)
    assert made.peers == () and set(made.missing) == {"fla", "flashinfer"}
    assert "no compiler" in made.missing["fla"]
    with pytest.raises(TrialError, match="no compiler"):
        made.seconds(Shape("prefill", 1, 70), PrefillWay("fla"))


class Clock:
    """Calls everything once and takes no time: peers are said to be the fastest, then tiles in the order of calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, how: str, calls: Sequence[Callable[[], Tensor]]) -> Times:
        self.count += 1
        served.clear()
        for call in calls:
            call()
        return Times(((1.0 if served else 1e3) + self.count,), how)


served: list[int] = []


def delta_rule(call: peers.PeerCall) -> tuple[Tensor, None]:
    """A peer's function: right, and it notes that it ran."""
    served.append(len(call.q))
    q, k, v = (part.float() for part in (call.q, call.k, call.v))
    out = torch.empty_like(v)
    final = delta_rule_rows(q, k, v, call.decay, call.beta, call.state, call.rows.cu_seqlens, out)
    call.out.copy_(out)
    return final, None


def test_a_whole_tuning_in_the_interpreter(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock is real: the trial, inputs, candidates, checks and the file."""
    clock = Clock()
    monkeypatch.setattr(machine_module, "EagerTimer", lambda: partial(clock, "eager"))
    monkeypatch.setattr(machine_module, "GraphTimer", lambda: partial(clock, "graph"))
    effort = replace(
        EFFORTS["quick"],
        prompts=((1, 20), (2, 40)),
        scouts=((2, 40),),
        batches=(1, 3),
        verified=(2,),
        drafts=(2,),
        slack=10.0,
        decode=(DecodeTile(None, 16), DecodeTile(64, 1)),
        verify=(VerifyTile(8, 2), VerifyTile(4, 1), VerifyTile(16, 1, PROJECTED)),
    )
    monkeypatch.setitem(EFFORTS, "a test's", effort)
    heads = Heads(1, 2)

    def made() -> CudaGdnMachine:
        def offer() -> None:
            peers.OFFERS.offer(peers.Peer("fla", delta_rule, log_decay=True, head_dim=TINY.gdn.head_k_dim))

        return CudaGdnMachine(with_heads(TINY, heads), "vllm", torch.device(device), offer)

    about, place = About({}, "a machine", "today"), Place(tmp_path, None)
    path, parts = tune_gdn(H200, heads, "vllm", "a test's", place, about, made, Console(quiet=True))
    shipped, first, own = read_file(path).prefill
    assert shipped.why.startswith("not measured, as shipped"), "FlashInfer's, which nobody offered"
    assert (first.way.runs, first.min_tokens, first.min_mean) == ("fla", 20, 20) and own.way.runs == OWN
    assert all(one.error <= ALLOWED_ERROR[one.shape.op] for part in parts for one in part.results)
    assert {one.chosen for one in parts[0].results} == {PrefillWay("fla")}


def test_what_cannot_be_captured_is_no_candidate(machine: CudaGdnMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "GraphTimer", lambda: partial(Clock(), "eager"))
    with pytest.raises(TrialError, match="cannot be captured in a CUDA graph"):
        machine.seconds(Shape("decode", 2), DecodeTile(None, 16))


def test_what_a_failed_run_means(machine: CudaGdnMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of\nresources")

    monkeypatch.setattr(machine_module, "gdn_work", fail)
    with pytest.raises(TrialError, match="RuntimeError: out of resources"):
        machine.error(Shape("decode", 2), DecodeTile(None, 16))
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(GpuLostError, match="out of resources"):
        machine.seconds(Shape("decode", 2), DecodeTile(None, 16))


def test_versions_change_with_the_kernels_and_not_with_who_chooses() -> None:
    names = {path.name for path in gdn_files()}
    assert {"triton_prefill.py", "triton_decode.py", "triton_verify_projected.py", "peers.py"} <= names
    assert not {"config.py", "choices.py"} & names


@pytest.mark.gpu
def test_a_whole_tuning_on_this_gpu(tmp_path: Path) -> None:
    dispatch.prefer(None)
    gpu, heads = cuda.this_gpu(), Heads(4, 8)
    spec = with_heads(parse_config(config_of("80b")), heads)

    def made() -> CudaGdnMachine:
        return CudaGdnMachine(spec, "none", torch.device("cuda", 0), nothing)

    about = About(cuda.versions(gdn_files()), cuda.this_machine(), "today")
    path, parts = tune_gdn(gpu, heads, "none", "quick", Place(tmp_path, None), about, made, Console(quiet=True))
    assert read_file(path).source == "measured"
    assert all(0 < one.seconds < 0.1 for part in parts for one in part.results)
