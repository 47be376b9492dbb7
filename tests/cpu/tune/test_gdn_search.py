"""A tuning of Gated DeltaNet's kernels with a machine that answers at once: pruning, rules, resuming, refusals."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.errors import PluginError, SettingsError
from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.config_file import read_file
from qwen3next_plugin.kernels.gdn.table import OWN, PROJECTED, DecodeTile, PrefillWay, VerifyTile
from qwen3next_plugin.kernels.gpus import Target
from qwen3next_plugin.tune.gdn.search import Search
from qwen3next_plugin.tune.gdn.space import EFFORTS, Candidate, Heads, Shape, chosen_by, effort_for
from qwen3next_plugin.tune.measuring import GpuLostError, TrialError
from tests.cpu.tune.fakes import H200, Killed
from tests.cpu.tune.gdn_fakes import (
    ABOUT,
    BLOCKS,
    DOUBLING,
    FLA,
    FLASHINFER,
    HEADS,
    MERGING,
    FakeGdnMachine,
    run,
    usual,
)

TARGET = Target(H200.name, H200.capability)


def test_the_file_holds_what_the_times_say(tmp_path: Path) -> None:
    path, parts = run(tmp_path, FakeGdnMachine())
    assert path == tmp_path / "h200" / "gdn.json"
    table = read_file(path)
    ways = [(rule.way, rule.min_tokens, rule.min_mean) for rule in table.prefill]
    best = PrefillWay(OWN, replace(BLOCKS.own, walk_stages=3))  # type: ignore[type-var]
    assert ways == [(FLASHINFER, 2048, 64), (FLA, 32768, 8192), (best, 0, 0)]
    tiles = [(rule.state_bytes, rule.min_programs, rule.tile) for rule in table.decode]
    whole = DecodeTile(None, 16)
    assert tiles == [(4, 512, DecodeTile(2048, 2)), (4, 0, whole), (2, 512, DecodeTile(1024, 2)), (2, 0, whole)]
    verify = {(rule.state_bytes, rule.max_tokens, rule.min_programs): rule.tile for rule in table.verify}
    at_once = VerifyTile(128, 4, PROJECTED)
    assert verify[4, 2, 512] == VerifyTile(128, 8) and verify[2, 2, 128] == verify[4, 4, 128] == at_once
    assert verify[4, 2, 0] == verify[2, 2, 0] == verify[4, 4, 0] == VerifyTile(128, 16)
    assert verify[2, 8, 0] == at_once, "as shipped"
    raw = json.loads(path.read_text())
    assert raw["versions"] == ABOUT.versions and raw["heads"] == "16/32" and raw["gpu"]["name"] == H200.name
    assert "2026-11-27" in raw["note"] and len(raw["measurements"]) == sum(len(part.results) for part in parts)
    assert all(one["relative_error"] == 1e-3 and one["before_us"] for one in raw["measurements"])
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def test_every_reason_says_what_it_rests_on(tmp_path: Path) -> None:
    path, _ = run(tmp_path, FakeGdnMachine())
    table = read_file(path)
    first, second, own = (rule.why for rule in table.prefill)
    begin = "measured on NVIDIA H200 with 16/32 heads, 2026-11-27: "
    assert first == begin + "8 shapes, prefill 1x2048 the smallest, 1.12 to 2.23 times as fast as our own kernels"
    assert second.endswith("1.23 to 1.24 times as fast as our own kernels, where the rules before it cannot run")
    assert own == begin + "1 shape, prefill 1x512 the smallest, 1.40 times as fast as what ran before"
    whys = [rule.why for rule in table.decode] + [rule.why for rule in table.verify]
    assert all(why.startswith(begin) for why in whys if "as shipped" not in why)
    shipped = {rule.max_tokens for rule in table.verify if rule.why.startswith("not measured, as shipped: ")}
    assert shipped == {8}, "more drafts than were measured"


@pytest.mark.parametrize("device_type", ["cuda"])
def test_the_kernels_obey_it(device_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = run(tmp_path, FakeGdnMachine(noise=0.05))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H200.capability)
    config.use_folder(tmp_path)
    config._target_of.cache_clear()
    try:
        table = config.table_of(torch.device(device_type, 0))
        assert table.source == "measured"
        for one in (result for part in parts for result in part.results):
            assert chosen_by(table, one.shape, HEADS, ("fla", "flashinfer")) == one.chosen
    finally:
        config.use_folder(None)
        config._target_of.cache_clear()


def test_who_is_far_from_the_best_at_the_scouts_is_left_out(tmp_path: Path) -> None:
    def slow(shape: Shape, candidate: Candidate) -> float:
        return usual(shape, candidate) * (2.0 if candidate in (DecodeTile(2048, 4), FLA) else 1.0)

    machine = FakeGdnMachine(slow)
    run(tmp_path, machine)
    met = {shape for what, shape, candidate in machine.answered if what == "seconds" and candidate == FLA}
    assert met == {Shape("prefill", 1, 2048), Shape("prefill", 8, 1024)}
    rows = {shape.rows for what, shape, candidate in machine.answered if candidate == DecodeTile(2048, 4)}
    table = config.shipped(TARGET)
    ran_before = {n for n in EFFORTS["default"].batches if config.decode_tile(table, 4, 16 * n) == DecodeTile(2048, 4)}
    assert rows == {1, 64} | ran_before != set(EFFORTS["default"].batches)
    narrow = {shape for _, shape, candidate in machine.answered if candidate == DecodeTile(1024, 2)}
    assert len(narrow) == 2 * len(EFFORTS["default"].batches), "near enough"
    unasked: Any = None
    search = Search(HEADS, EFFORTS["default"], config.shipped(TARGET), machine.peers, unasked)
    planned = sum(part.count for part in search.parts())
    assert len([what for what, *_ in machine.answered if what == "seconds"]) < 0.8 * planned


def test_the_kernels_over_tiles_are_tried_on_sm_90_alone(tmp_path: Path) -> None:
    def quick(shape: Shape, candidate: Candidate) -> float:
        return usual(shape, candidate) * (0.1 if isinstance(candidate, PrefillWay) and _merges(candidate) else 1.0)

    machine = FakeGdnMachine(quick)
    path, _ = run(tmp_path, machine)
    assert [rule.way for rule in read_file(path).prefill] == [MERGING], "with three stages, as by `usual`"
    stages = {one.own.walk_stages for *_, one in machine.answered if isinstance(one, PrefillWay) and _merges(one)}  # type: ignore[union-attr]
    assert stages == {1, 2, 3}
    for name, effort in EFFORTS.items():
        assert effort_for(name, (9, 0)) == effort and MERGING.own in effort.chunks
        for capability in ((8, 0), (8, 9), (10, 0)):
            chunks = effort_for(name, capability).chunks
            assert chunks == tuple(own for own in effort.chunks if own.inverse != "merging") and chunks


def _merges(way: PrefillWay) -> bool:
    return way.own is not None and way.own.inverse == "merging"


def test_a_wrong_one_rules_nobody_out_and_is_not_chosen(tmp_path: Path) -> None:
    def quick(shape: Shape, candidate: Candidate) -> float:
        return usual(shape, candidate) * (0.1 if candidate in (DOUBLING, DecodeTile(1024, 2)) else 1.0)

    def wrong(shape: Shape, candidate: Candidate) -> bool:
        return candidate == DecodeTile(1024, 2) or (candidate == DOUBLING and shape.rows > 1)

    path, parts = run(tmp_path, FakeGdnMachine(quick, wrong=wrong))
    table = read_file(path)
    assert DecodeTile(1024, 2) not in {rule.tile for rule in table.decode}
    for one in (result for part in parts for result in part.results):
        assert not wrong(one.shape, one.chosen) and one.error <= 1e-3
    alone = [one.chosen for one in parts[0].results if one.shape.rows == 1]
    assert DOUBLING in alone, "right there, and fastest"
    with pytest.raises(PluginError, match=r"Nothing that could run prefill .* gives the reference's output"):
        run(tmp_path / "all", FakeGdnMachine(wrong=lambda shape, candidate: True))
    assert not list((tmp_path / "all").glob("h200/*.json"))


def test_peers_that_are_not_here_keep_their_shipped_rules(tmp_path: Path) -> None:
    path, _ = run(tmp_path, FakeGdnMachine(peers=("fla",)))
    first, *rest = read_file(path).prefill
    assert (first.way, first.min_tokens) == (FLASHINFER, 512) and first.why.startswith("not measured, as shipped: ")
    assert [rule.way.runs for rule in rest] == ["fla", "own"]
    assert json.loads(path.read_text())["missing"] == {"flashinfer": "not in this engine"}


def test_what_does_not_run_is_passed_over_and_not_asked_again(tmp_path: Path) -> None:
    def refuses(shape: Shape, candidate: Candidate) -> Exception | None:
        return TrialError("out of resources") if isinstance(candidate, PrefillWay) and candidate.own and (
            candidate.own.walk_stages == 3
        ) else None  # fmt: skip

    path, _ = run(tmp_path, FakeGdnMachine(refuses=refuses))
    assert all(rule.way.own is None or rule.way.own.walk_stages != 3 for rule in read_file(path).prefill)
    again = FakeGdnMachine()
    run(tmp_path, again)
    assert not again.answered


def test_what_fells_the_gpu_is_left_out_when_it_is_taken_up_again(tmp_path: Path) -> None:
    def refuses(shape: Shape, candidate: Candidate) -> Exception | None:
        return GpuLostError("illegal access") if candidate == VerifyTile(64, 4) else None

    deaths = 0
    for _ in range(20):
        try:
            path, _ = run(tmp_path, FakeGdnMachine(refuses=refuses))
            break
        except PluginError as error:
            assert "illegal access" in str(error) and "run the same command again" in str(error)
            deaths += 1
    assert deaths and VerifyTile(64, 4) not in {rule.tile for rule in read_file(path).verify}


def final(folder: Path) -> str:
    return next(folder.glob("h200/*.json")).read_text().replace('"machines": 2', '"machines": 1')


@given(lives=st.integers(0, 260), noise=st.sampled_from([0.0, 0.3]), cut=st.integers(0, 300))
def test_killed_anywhere_and_resumed_elsewhere_it_ends_the_same_and_measures_nothing_twice(
    lives: int, noise: float, cut: int
) -> None:
    """`cut` bytes of the last line were still unwritten when the machine went away."""
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        at_once = FakeGdnMachine(noise=noise)
        run(whole, at_once, "quick")
        first = FakeGdnMachine(noise=noise, lives=lives)
        lost = None
        try:
            run(broken, first, "quick")
        except Killed:
            state = next(broken.glob("h200/*.state.jsonl"))
            *_, last = state.read_bytes().splitlines(keepends=True)
            cut = min(cut, len(last))
            state.write_bytes(state.read_bytes()[: -cut or None])
            lost = first.answered[-1] if cut and b'"machine"' in last else None
        second = FakeGdnMachine(noise=noise)
        run(broken, second, "quick", replace(ABOUT, machine="machine two"))
        assert final(whole) == final(broken)
        again = [answer for answer in second.answered if answer in first.answered]
        assert again == ([] if lost is None else [lost])
        assert len(second.answered) == len(at_once.answered) - len(first.answered) + len(again)


def test_a_mixture_of_machines_is_marked(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, FakeGdnMachine(lives=10))
    path, _ = run(tmp_path, FakeGdnMachine(), about=replace(ABOUT, machine="machine two"))
    machines = [one["machines"] for one in json.loads(path.read_text())["measurements"]]
    assert 2 in machines and machines[-1] == 1


def test_more_effort_later_measures_only_what_is_new(tmp_path: Path) -> None:
    first, more = FakeGdnMachine(), FakeGdnMachine()
    run(tmp_path, first, "quick")
    run(tmp_path, more, "default")
    assert more.answered and not set(more.answered) & set(first.answered)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": Heads(8, 16)}, "another heads (keys 16, values 32; here it is keys 8, values 16)"),
        (
            {"about": replace(ABOUT, versions={"torch": "2.13", "triton": "3.9"})},
            "another triton (3.7; here it is 3.9)",
        ),
    ],
)
def test_a_state_of_something_else_is_refused_in_one_sentence(change: Any, words: str, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    run(tmp_path, FakeGdnMachine(), "quick", state=state)
    machine = FakeGdnMachine()
    with pytest.raises(SettingsError) as caught:
        run(tmp_path, machine, "quick", state=state, **change)
    assert words in str(caught.value) and str(caught.value).endswith("give another --state.")
    assert not machine.answered


def test_a_moe_state_is_no_gdn_state(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    state.write_text('{"format": 1, "identity": {}}\n{"what": "before", "tokens": 1, "config": {}, "value": null}\n')
    with pytest.raises(SettingsError, match="is not a state file of `qwen3next tune`"):
        run(tmp_path, FakeGdnMachine(), state=state)


def test_lines_and_table_before_and_after(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from qwen3next_plugin.tune.gdn.result import as_line, as_table

    _, parts = run(tmp_path, FakeGdnMachine(), "quick")
    assert as_line(parts[0].results[0]) == (
        "prefill 1x512: 107.4 -> 76.9 us (1.40x) with own, inverse by blocks, 4 warps, 3 stages"
    )
    shown = io.StringIO()
    Console(file=shown, width=140).print(as_table(parts))
    assert "before, us" in shown.getvalue() and "verify 64x4, bfloat16 states" in shown.getvalue()
