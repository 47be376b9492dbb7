"""Single operations beside the engines' own: cases, works, runs that lose something, and what a run writes."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen3next_plugin.bench.kernels import measure, moe_work
from qwen3next_plugin.bench.kernels.bounds import BY_PEER
from qwen3next_plugin.bench.kernels.cases import KERNEL_CASES, MOE_CASES, parse_case, parse_cases
from qwen3next_plugin.bench.kernels.measure import GpuLostError, Run
from qwen3next_plugin.bench.kernels.moe_work import JOINED, MoeBuilder
from qwen3next_plugin.bench.kernels.peers import Prepare
from qwen3next_plugin.bench.kernels.session import builder, run_parts
from qwen3next_plugin.bench.kernels.state import DIED, PartState
from qwen3next_plugin.bench.kernels.timing import Times
from qwen3next_plugin.bench.kernels.work import Call, Engine, Prepared, Work
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.moe import peer_table, ways
from qwen3next_plugin.kernels.moe import peers as moe_peers
from tests.kernels.moe_peer_case import FakeDeepGemm, empty_registry, rule

SPEC = parse_config(config_of("tiny", fp8=True))
CPU = torch.device("cpu")
BUILD = builder(MoeBuilder(SPEC, CPU))
NAMES = (
    "gdn-decode-b3 gdn-decode-b12-bf16state gdn-verify4-b9 gdn-prefill-3x70 gdn-prefill-1x300 conv-prefill-33 "
    "norm-add-5 qk-norm-rope-write-7 dense-qkvz-m3 dense-router-m2 moe-fp8-tp1-m3 moe-bf16-tp2-m40"
).split()


class Clock:
    """Takes no time: each call of it says a microsecond more than the one before."""

    def __init__(self) -> None:
        self.count = 0
        self.lost = False

    def __call__(self, calls: Sequence[Call]) -> Times:
        self.count += 1
        for call in calls:
            call()
        return Times(tuple(1e-6 * microseconds for microseconds in self.times()), "graph")

    def times(self) -> tuple[float, ...]:
        return tuple(self.count + n / 100 for n in range(5))

    def alive(self) -> bool:
        return not self.lost


def case_of(name: str) -> Any:
    return parse_case("moe" if name.startswith("moe") else "kernels", name)


def run_on(path: Path, engine: Engine, clock: Clock, cases: Sequence[str], deadline: float | None = None) -> PartState:
    state = PartState(path, {"kind": "kernels", "engine": engine}, "a machine")
    run = Run(state, SPEC, engine, CPU, clock, BUILD)
    run.said = lambda text: None
    run.cases([case_of(name) for name in cases], deadline, lambda: None)
    return state


def with_peers(monkeypatch: pytest.MonkeyPatch, **peers: Callable[[Work], list[Prepared]]) -> None:
    def found(engine: Engine, op: str) -> Iterator[tuple[str, Prepare]]:
        yield from ((name.replace("_", "-"), prepare) for name, prepare in peers.items())

    monkeypatch.setattr(measure, "peers_of", found)


def as_own(work: Work) -> list[Prepared]:
    return [work.own["own"]]


def raises(work: Work) -> list[Prepared]:
    raise RuntimeError("no such\nkernel   here")


def wrong(work: Work) -> list[Prepared]:
    return [Prepared([lambda: work.own["own"].calls[0]() * 1.5])]


def test_every_case_has_a_name_that_says_it() -> None:
    assert [case.name for case in parse_cases("kernels", "all")] == list(KERNEL_CASES)
    assert [case.name for case in parse_cases("moe", "all")] == list(MOE_CASES)
    assert len(parse_cases("moe", "moe-fp8-tp1-*, moe-fp8-tp1-m1")) == 12
    found = parse_case("kernels", "gdn-verify4-b64")
    assert (found.op, found.tokens, found.rows, found.unit) == ("gdn-verify", 4, 64, "us")
    assert parse_case("kernels", "gdn-prefill-4x8192").unit == "ms"
    for text in ("gdn-decode-b0", "moe-fp8-tp1-m1", "dense-qkvz", "gdn-*-none"):
        with pytest.raises(SettingsError, match="--rows"):
            parse_cases("kernels", text)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", NAMES)
def test_own_kernels_are_right_in_every_work_however_often_they_ran(name: str, engine: Engine) -> None:
    work = BUILD(case_of(name), SPEC, engine, CPU)
    for series, prepared in work.own.items():
        assert len(prepared.calls) == len(work.inputs) > 1
        for _ in range(2):
            assert work.error(prepared) < 5e-3, series
        spoiled = Prepared([lambda prepared=prepared: prepared.calls[0]() * 1.1], prepared.does)  # type: ignore[misc]
        assert work.error(spoiled) > 0.05, series
        ruined = Prepared([lambda prepared=prepared: prepared.calls[0]() * float("nan")], prepared.does)  # type: ignore[misc]
        assert work.error(ruined) == float("inf")
    assert work.bytes > 0 and work.text


def test_the_shared_expert_is_one_more_in_what_the_plugin_runs() -> None:
    work = BUILD(parse_case("moe", "moe-fp8-tp1-m8"), SPEC, "vllm", CPU)
    assert work.own["plugin"].does == JOINED and work.share_of == "plugin"
    one = work.inputs[0]
    joined, routed = one.arguments("joined"), one.arguments("routed")
    assert joined[1].shape[0] == routed[1].shape[0] + 1 == SPEC.moe.num_experts + 1
    assert joined[4].shape[1] == routed[4].shape[1] + 1 == SPEC.moe.top_k + 1
    assert bool((joined[4][:, -1] == SPEC.moe.num_experts).all()) and int(routed[4].max()) < SPEC.moe.num_experts
    assert work.facts["padded_flops"] >= work.facts["useful_flops"] == work.flops


def test_the_checkpoints_order_is_what_the_engines_take_apart() -> None:
    from qwen3next_plugin.bench.kernels.peers.common import split_interleaved

    work = BUILD(parse_case("kernels", "gdn-decode-b3"), SPEC, "vllm", CPU)
    one = work.inputs[0]
    qkvz, ba = work.about.interleaved(one)
    mixed, z, b, a = split_interleaved(qkvz, ba, SPEC.gdn)
    assert torch.equal(torch.cat([mixed, z.flatten(1)], dim=-1), one.qkvz)
    assert torch.equal(torch.cat([b, a], dim=-1), one.ba)


def test_a_peer_that_fails_costs_its_own_entry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peers(monkeypatch, vllm=as_own, vllm_raises=raises, vllm_wrong=wrong, vllm_none=lambda work: [])
    row = run_on(tmp_path / "s.json", "vllm", Clock(), ["norm-add-5"]).data["rows"]["norm-add-5"]
    series = row["series"]
    assert row["done"] and series["own"]["value"] == 1.02 and series["vllm"]["value"] == 2.02
    assert series["own"]["repeats"] == [1.0, 1.01, 1.02, 1.03, 1.04] and series["own"]["relative_error"] < 5e-3
    assert series["vllm-raises"] == {"value": None, "why": "RuntimeError: no such kernel here"}
    assert series["vllm-wrong"]["value"] is None and "0.5" in series["vllm-wrong"]["why"]
    assert series["vllm-none"]["why"] == "RuntimeError: there is nothing to run"


def test_of_alternatives_the_fastest_counts_and_those_that_fail_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def several(work: Work) -> list[Prepared]:
        own = work.own["own"].calls
        return [*wrong(work), Prepared(own, facts={"config": "first"}), Prepared(own, facts={"config": "second"})]

    with_peers(monkeypatch, vllm=several)
    series = run_on(tmp_path / "s.json", "vllm", Clock(), ["norm-add-5"]).data["rows"]["norm-add-5"]["series"]
    assert series["vllm"]["config"] == "first"


def test_repeats_that_are_apart_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long repeat is nothing, and neither is what stays so after the third time: the file shows it."""
    apart, steady = (1.0, 1.3, 1.1, 1.2, 1.0), (1.0, 1.01, 9.0, 1.02, 1.03)
    for found, kept in (([apart, steady], steady), ([apart] * 3, apart)):
        left = iter(found)
        clock = Clock()
        monkeypatch.setattr(clock, "times", lambda left=left: next(left), raising=False)
        row = run_on(tmp_path / f"{len(found)}.json", "vllm", clock, ["norm-add-5"]).data["rows"]["norm-add-5"]
        assert row["series"]["own"]["repeats"] == list(kept) and next(left, None) is None


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_peers(monkeypatch, vllm=as_own)
    path, clock = tmp_path / "s.json", Clock()
    run_on(path, "vllm", clock, ["norm-add-5"])
    assert clock.count == 2
    state = run_on(path, "vllm", clock, ["norm-add-5", "norm-add-6"])
    assert clock.count == 4 and set(state.data["rows"]) == {"norm-add-5", "norm-add-6"}
    assert set(run_on(path, "vllm", clock, ["norm-add-7"], deadline=0.0).data["rows"]) == {"norm-add-5", "norm-add-6"}
    with pytest.raises(SettingsError, match="another engine"):
        run_on(path, "sglang", clock, [])


def test_what_killed_the_process_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clock = tmp_path / "s.json", Clock()

    def dies(work: Work) -> list[Prepared]:
        raise KeyboardInterrupt

    with_peers(monkeypatch, vllm=dies)
    with pytest.raises(KeyboardInterrupt):
        run_on(path, "vllm", clock, ["norm-add-5"])
    with_peers(monkeypatch, vllm=as_own)
    row = run_on(path, "vllm", clock, ["norm-add-5"]).data["rows"]["norm-add-5"]
    assert row["series"]["vllm"] == {"value": None, "why": DIED} and row["series"]["own"]["value"] == 1.02
    assert clock.count == 1 and row["done"]


def test_a_lost_gpu_ends_the_run_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def loses(work: Work) -> list[Prepared]:
        clock.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    with_peers(monkeypatch, vllm=loses, vllm_other=as_own)
    with pytest.raises(GpuLostError, match="with vllm in norm-add-5: run the same command again"):
        run_on(tmp_path / "s.json", "vllm", clock, ["norm-add-5"])
    clock.lost = False
    series = run_on(tmp_path / "s.json", "vllm", clock, ["norm-add-5"]).data["rows"]["norm-add-5"]["series"]
    assert "illegal" in series["vllm"]["why"] and series["vllm-other"]["value"] is not None


def test_a_case_whose_inputs_do_not_fit_is_said_and_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> Work:
        raise torch.cuda.OutOfMemoryError("out of memory")

    state = PartState(tmp_path / "s.json", {"kind": "kernels", "engine": "vllm"}, "a machine")
    Run(state, SPEC, "vllm", CPU, Clock(), build).cases([case_of("norm-add-5")], None, lambda: None)
    assert state.data["rows"]["norm-add-5"]["series"]["own"]["why"] == "OutOfMemoryError: out of memory"


def test_no_gpu_and_no_engine_of_that_name_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="--peers: 'trt' is not known"):
        run_parts("kernels", "trt", "all", None, tmp_path, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="no NVIDIA GPU"):
        run_parts("kernels", "vllm", "all", None, tmp_path, None)


def test_adapters_import_no_engine_before_they_are_asked() -> None:
    adapters = (f"peers.{engine}_{part}" for engine in ("vllm", "sglang") for part in ("gdn", "layers", "moe"))
    text = "import sys\n" + "\n".join(
        f"import qwen3next_plugin.bench.kernels.{name}" for name in ("session", *adapters)
    )
    text += "\nassert not {'vllm', 'sglang', 'flashinfer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_where_an_engine_would_run_the_products_our_own_are_measured_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(dispatch, "_preferred", "triton")
    moe = replace(SPEC.moe, intermediate_size=128, shared_intermediate_size=128)
    spec = replace(SPEC, hidden_size=256, moe=moe)
    fake, build = FakeDeepGemm(), MoeBuilder(spec, CPU)
    shape = moe_peers.ExpertShape(moe.num_experts + 1, 256, 128)
    with empty_registry(rule(20)):
        moe_peers.OFFERS.offer(fake.peer())
        moe_peers.OFFERS.tried.add(("deepgemm", shape))
        monkeypatch.setattr(peer_table, "MIN_TOKENS", 10)
        for tokens, further in ((9, set()), (19, set(BY_PEER))):
            work = build(parse_case("moe", f"moe-fp8-tp1-m{tokens}"), spec, "vllm", CPU)
            assert set(work.own) == {"own", "plugin"} | further
        work = build(parse_case("moe", "moe-fp8-tp1-m20"), spec, "vllm", CPU)
        rows = moe_peers.rows_for(20, moe.top_k + 1, shape.experts, 16)
        assert work.facts["config"] == {"peer": "deepgemm", "alignment": 16, "rows": rows}
        calls = {}
        for name, prepared in work.own.items():
            fake.rows.clear()
            assert work.error(prepared) < 0.02
            calls[name] = len(fake.rows)
        assert calls == {"own": 0, "plugin": 2, "kernels": 0, "deepgemm-64": 2, "deepgemm-128": 2}


def test_an_engines_products_are_tried_once_a_shape_that_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[moe_peers.ExpertShape] = []

    def offer(tokens: int, inner: int) -> None:
        tensors = {"w13": torch.empty(9, 2 * inner, 256), "w2": torch.empty(9, 256, inner), "s13": torch.empty(0)}
        one: Any = SimpleNamespace(x=SimpleNamespace(is_cuda=True, shape=(tokens, 256), device=CPU), **tensors)
        moe_work._offer("vllm", parse_case("moe", f"moe-fp8-tp1-m{tokens}"), one)

    def note(shape: moe_peers.ExpertShape, device: torch.device) -> None:
        tried.append(shape)
        moe_peers.OFFERS.tried.add(("deepgemm", shape))

    asked: list[str] = []

    def named(path: str) -> Callable[[], moe_peers.Peer]:
        asked.append(path)
        return FakeDeepGemm().peer

    monkeypatch.setattr(moe_work, "named", named)
    monkeypatch.setattr(moe_work, "try_offers", note)
    monkeypatch.setattr(peer_table, "MIN_TOKENS", 20)
    with empty_registry(rule()):
        for tokens, inner in ((19, 128), (20, 64), (20, 128), (64, 128), (20, 256)):
            offer(tokens, inner)
    assert tried == [moe_peers.ExpertShape(9, 256, 128), moe_peers.ExpertShape(9, 256, 256)]
    assert asked == ["qwen3next_plugin.vllm_integration.moe_peers:load_deepgemm"]
