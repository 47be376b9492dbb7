"""Which kernels and tiles run, by files for a GPU, its family or any; and that launches obey them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import gdn, gpus
from qwen3next_plugin.kernels.gdn import config, triton_decode, triton_prefill, triton_tiled, triton_verify
from qwen3next_plugin.kernels.gdn.choices import prefill_choices
from qwen3next_plugin.kernels.gdn.config_file import read_file, rule_object
from qwen3next_plugin.kernels.gdn.table import (
    FORMS,
    OWN,
    PROJECTED,
    STEPS,
    DecodeTile,
    OwnPrefill,
    PrefillRule,
    PrefillWay,
    StatesTile,
    VerifyTile,
)
from qwen3next_plugin.kernels.gpus import Target

from .draft_case import Case
from .gdn_case import make_tokens, run_prefill
from .layer_case import EPS, make_layer

SHIPPED = config.CONFIGS / "any" / "gdn.json"
RULES = json.loads(SHIPPED.read_text())
TILED = RULES["decode"][1] | {"num_stages": 3}
STATES = {"state_bytes": 4, "max_tokens": 4, "min_programs": 6, "rows": 32, "num_warps": 4, "why": "a test"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    config.use_folder(None)
    config._from_files.cache_clear()


def write(folder: Path, name: str = "h200", **changes: Any) -> Path:
    path = folder / name / "gdn.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(RULES | {"source": "measured"} | changes))
    return path


def own_rule(**changes: Any) -> dict[str, Any]:
    return RULES["prefill"][-1] | changes


@pytest.mark.parametrize("path", sorted(config.CONFIGS.glob("*/gdn.json")), ids=lambda path: str(path.parent.name))
def test_shipped_files_say_what_of_them_was_measured(path: Path) -> None:
    table, raw = read_file(path), json.loads(path.read_text())
    if table.source == "prediction":
        assert "qwen3next tune gdn" in raw["note"]
        peers = [rule for rule in table.prefill if rule.way.runs != OWN]
        assert all(rule.why.startswith("a prediction, not measured") for rule in peers)
    else:
        whys = [rule.why for rule in table.decode] + [rule.why for rule in table.verify]
        whys += [rule.why for rule in table.states]
        whys += [rule.why for rule in table.prefill if rule.way.runs == OWN]
        assert {why.split(" ")[0] for why in whys} == {"measured", "not"} and raw["measurements"]
    listed = [rule_object(rule) for rule in (*table.prefill, *table.decode, *table.verify, *table.states)]
    written = raw["prefill"] + raw["decode"] + raw["verify"] + raw.get("states", [])
    assert listed == written, "what is written is what is read"


def test_the_most_particular_file_is_taken_and_a_users_folder_comes_first(tmp_path: Path) -> None:
    h200, h20, l40s = (Target(gpus.KNOWN[name].name, gpus.KNOWN[name].capability) for name in ("h200", "h20", "l40s"))
    assert [config.find(gpu).path for gpu in (h200, h20, l40s, gpus.NO_GPU)] == [
        config.CONFIGS / "h200" / "gdn.json", config.CONFIGS / "sm90" / "gdn.json", SHIPPED, SHIPPED,
    ]  # fmt: skip
    mine = write(tmp_path)
    config.use_folder(tmp_path)
    assert config.find(h200).path == mine and config.is_users(mine)
    assert config.find(h20).path == config.CONFIGS / "sm90" / "gdn.json"
    assert config.shipped(h200) == read_file(config.CONFIGS / "h200" / "gdn.json"), "whatever the user has"
    family = write(tmp_path, "sm90")
    config._from_files.cache_clear()
    assert config.find(h20).path == family


def test_tables_that_a_kernel_meets() -> None:
    """Decodes: as before there were files. Verifications: float32 states of one or two tokens go token by token."""
    table = config.find(Target("NVIDIA H100 80GB HBM3", (9, 0))).table
    assert config.decode_tile(table, 4, 255) == config.decode_tile(table, 2, 1) == DecodeTile(None, 16)
    assert config.decode_tile(table, 4, 1023) == DecodeTile(2048, 2)
    assert config.decode_tile(table, 2, 1023) == DecodeTile(1024, 2)
    steps, at_once = VerifyTile(128, 8, STEPS), VerifyTile(128, 4, PROJECTED)
    h200 = config.find(Target(gpus.KNOWN["h200"].name, (9, 0))).table
    staged = {config.decode_tile(one, size, 1024) for one in (table, h200) for size in (4, 2)}
    assert staged == {DecodeTile(1024, 2, 5)}, "what fills a GPU takes its tiles through shared memory"
    assert {rule.tile.num_stages for rule in config.find(gpus.NO_GPU).table.decode} == {1}, "not measured elsewhere"
    for one, programs in product((table, h200), (32, 1023, 1024, 8192)):
        found = [[config.verify_tile(one, size, tokens, programs) for tokens in (1, 2, 3, 4, 8, 9)] for size in (4, 2)]
        two = steps if programs < 1024 else at_once
        assert found == [[steps] * 2 + [at_once] * 4, [two] * 2 + [at_once] * 4]
    other = config.find(gpus.NO_GPU).table
    assert {rule.tile.form for rule in other.verify} == {STEPS}, "where nothing of this was measured"
    assert other.states == (), "as little"
    for one, size, tokens in product((table, h200), (4, 2), range(1, 9)):
        from_which, warps = (256, 8) if size == 4 else (512, 4)
        found_states = [config.states_tile(one, size, tokens, from_which - less) for less in (1, 0)]
        assert found_states == [None, StatesTile(64, warps)]
        assert config.states_tile(one, size, 9, 8192) is None
    assert config.own_prefill(table, 1, 1) == OwnPrefill("merging", 4, 168, 3)
    assert config.own_prefill(config.find(Target("NVIDIA L40S", (8, 9))).table, 1, 1) == OwnPrefill()
    fitting = [rule.way.runs for rule in config.prefill_rules(table, 1000, 1)]
    assert fitting == ["flashinfer", "own"]
    assert [rule.way.runs for rule in config.prefill_rules(table, 4000, 100)] == ["own"], "40 tokens a row"


def test_the_first_rule_that_fits_decides_on_our_own_variant() -> None:
    table = config.table_of(torch.device("cpu"))
    blocks = PrefillRule(PrefillWay(OWN, OwnPrefill("blocks")), 100, 10, "a test")
    table = type(table)(table.source, (blocks, *table.prefill), table.decode, table.verify)
    chosen = [
        config.own_prefill(table, tokens, rows).inverse for tokens, rows in ((99, 1), (100, 1), (100, 10), (100, 11))
    ]
    assert chosen == ["doubling", "blocks", "blocks", "doubling"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"source": "x"}, "from 'x'"),
        ({"prefill": []}, "the last rule of prefill is not 'own' from 0 tokens on"),
        ({"prefill": [own_rule(min_tokens=1)]}, "the last rule of prefill is not 'own' from 0 tokens on"),
        ({"prefill": [own_rule(runs="flash")]}, "runs is 'flash', which is none of own, flashinfer, fla"),
        ({"prefill": [own_rule(inverse="lu")]}, "inverse is 'lu', which is none of doubling, blocks, merging"),
        ({"prefill": [own_rule(walk_stages=0)]}, "walk_stages is 0, which is no whole number from 1 on up to 8"),
        ({"prefill": [own_rule(chunk_registers=16)]}, "chunk_registers is 16"),
        ({"prefill": [own_rule(min_mean="64"), own_rule()]}, "min_mean is '64'"),
        ({"prefill": [own_rule(why="")]}, "why is '', which is no text"),
        ({"decode": RULES["decode"][:1]}, "decode has no rule for states of 2 bytes from 0 programs on"),
        ({"decode": [RULES["decode"][0] | {"num_warps": 3}]}, "num_warps is 3, which is no power of two"),
        ({"decode": [RULES["decode"][0] | {"elements": 100}]}, "elements is 100, which is no power of two"),
        ({"decode": [TILED | {"num_stages": 0}]}, "num_stages is 0, which is no whole number from 1 on up to 8"),
        ({"decode": [TILED | {"num_stages": 2.0}]}, "num_stages is 2.0, which is no whole number"),
        ({"decode": [TILED | {"elements": None}]}, "num_stages is 3 for None elements: stages are of tiles"),
        ({"decode": [TILED | {"elements": 8192}]}, "num_stages is 3 for 8192 elements: stages are of tiles"),
        ({"verify": RULES["verify"][1:]}, "verify has no rule for 2 tokens and states of 4 bytes from 0 programs on"),
        ({"verify": []}, "verify has no rule for states of 4 bytes"),
        ({"verify": [RULES["verify"][0] | {"form": "whole"}]}, "form is 'whole', which is none of steps, projected"),
        (
            {"verify": [RULES["verify"][0] | {"form": "projected", "rows": 8}]},
            "rows is 8, which is no whole number from 16 on up to 256",
        ),
        ({"verify": [RULES["verify"][0] | {"state_bytes": 1}]}, "state_bytes is 1, which is none of 4, 2"),
        ({"verify": [{}]}, "KeyError"),
        ({"states": [STATES | {"rows": 3}]}, "rows is 3, which is no power of two"),
        ({"states": [STATES | {"max_tokens": 0}]}, "max_tokens is 0, which is no whole number from 1 on"),
        ({"states": [STATES | {"state_bytes": 8}]}, "state_bytes is 8, which is none of 4, 2"),
        ({"decode": 3}, "TypeError"),
    ],
)  # fmt: skip
def test_a_file_that_means_nothing_is_refused_in_one_sentence(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        config.use_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a table of Gated DeltaNet's kernels of format 1") and said in message
    assert message.endswith("write it anew with `qwen3next tune gdn`, or take it away") and "\n" not in message


def test_what_is_no_json_and_what_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path).write_text("{")
    with pytest.raises(ValueError, match="is not a table of Gated DeltaNet's kernels"):
        config.use_folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder: give the one that `qwen3next tune gdn` wrote to"):
        config.use_folder(tmp_path / "nowhere")


def test_every_table_together_chooses_all_that_one_can(tmp_path: Path) -> None:
    prefill = [own_rule(min_tokens=9, inverse="blocks"), own_rule(min_tokens=5, walk_stages=3), own_rule()]
    states = [STATES, STATES | {"min_programs": 9, "rows": 64}, STATES | {"max_tokens": 2, "rows": 16}]
    table = read_file(write(tmp_path, prefill=prefill, states=states))
    for state_bytes in (2, 4):
        for tokens in (1, 3, 8):
            tables = config.every_table(table, state_bytes, tokens)
            ways = {one.prefill[0].way for one in tables}
            assert ways == {rule.way for rule in table.prefill}
            for one in tables:
                assert len({config.own_prefill(one, count, 1) for count in (1, 6, 100)}) == 1
            decode = {config.decode_tile(one, state_bytes, 1) for one in tables}
            assert decode == {config.decode_tile(table, state_bytes, programs) for programs in (1, 10**6)}
            verify = {config.verify_tile(one, state_bytes, tokens, 1) for one in tables}
            assert verify == {config.verify_tile(table, state_bytes, tokens, programs) for programs in (1, 10**6)}
            kept = {config.states_tile(one, state_bytes, tokens, 1) for one in tables}
            assert kept == {config.states_tile(table, state_bytes, tokens, programs) for programs in (1, 6, 10**6)}
            assert len(kept) == {(4, 1): 2, (4, 3): 3}.get((state_bytes, tokens), 1)


class Noted:
    """Stands in for a kernel: the options of each launch."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.options.append(options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Noted]:
    names = ("chunk", "walk", "gates", "tiled chunk", "tiled walk", "decode", "staged decode", *FORMS)
    noted = {name: Noted() for name in names}
    monkeypatch.setattr(triton_prefill, "_chunk_kernel", noted["chunk"])
    monkeypatch.setattr(triton_prefill, "_walk_kernel", noted["walk"])
    for name in ("gates", "chunk", "walk"):
        own = noted[name if name == "gates" else f"tiled {name}"]
        monkeypatch.setattr(triton_tiled, f"{name}_kernel", own)
    monkeypatch.setattr(triton_decode, "_gdn_decode_kernel", noted["decode"])
    monkeypatch.setattr(triton_decode, "gdn_decode_staged_kernel", noted["staged decode"])
    for form in FORMS:
        monkeypatch.setattr(triton_verify, f"gdn_verify_{form}_kernel", noted[form])
    return noted


def test_launches_obey_a_users_file(launches: dict[str, Noted], tmp_path: Path, device: str) -> None:
    name = gpus.gpu_slug(torch.cuda.get_device_name()) if device == "cuda" else "any"
    decode = [
        {"state_bytes": size, "min_programs": programs, "elements": elements, "num_warps": warps, "why": "a test"}
        for size in (2, 4)
        for programs, elements, warps in ((0, None, 16), (8, 32, 1))
    ]  # as files of before there were stages
    decode += [
        decode[-1] | {"state_bytes": size, "min_programs": 9, "elements": 64, "num_stages": 3} for size in (2, 4)
    ]
    verify = [
        {"state_bytes": size, "max_tokens": 4, "min_programs": programs, **tile, "num_warps": 2, "why": "a test"}
        for size in (2, 4)
        for programs, tile in (
            (0, {"rows": 8, "form": STEPS}),
            (8, {"rows": 4, "form": STEPS}),
            (10, {"rows": 16, "form": PROJECTED}),
        )
    ]
    prefill = [own_rule(min_tokens=20, inverse="blocks", chunk_warps=8, chunk_registers=168), own_rule()]
    write(tmp_path, name, prefill=prefill, decode=decode, verify=verify)
    config.use_folder(tmp_path)
    for length in (19, 20):
        tokens = make_tokens(length, device)
        run_prefill(tokens, tokens.state(2), [(0, length, 1)], [False], "triton")
    built = [(one["BY_BLOCKS"], one["num_warps"], one["maxnreg"]) for one in launches["chunk"].options]
    assert built == [(False, 4, None), (True, 8, 168)]
    for rows in (7, 8, 9):
        layer = make_layer(rows, device)
        count = torch.arange(rows + 1, device=device)
        ranges = {"query_start": count[:-1], "query_end": count[1:], "state_slots": count[:-1]}
        state, windows = layer.tokens.state(rows), layer.windows(rows, 3, torch.float32, "contiguous")
        options = {"num_k_heads": 1, "norm_eps": EPS, "out": layer.tokens.out(), "backend": "triton"}
        gdn.gdn_decode_fused(*layer.arguments(), windows, state, **ranges, **options)
    tiles = [(one["BLOCK_V"], one["AHEAD"], one["num_warps"]) for one in launches["decode"].options]
    assert tiles == [(8, False, 1), (2, True, 1)], "a small head whole by one warp; then 32 elements of 16 columns"
    staged = [(one["BLOCK_V"], one["STAGES"], one["num_warps"]) for one in launches["staged decode"].options]
    assert staged == [(4, 3, 1)]
    for rows in (3, 4, 5):
        layer = make_layer(3 * rows, device, dims=(8, 32))
        Case([layer], [(3 * row, 3 * row + 3, row) for row in range(rows)], "triton").verify()
    verified = {
        form: [(one["BLOCK_V"], one["BLOCK_K"], one["num_warps"]) for one in launches[form].options] for form in FORMS
    }
    assert verified == {STEPS: [(8, 8, 2), (4, 8, 2)], PROJECTED: [(16, 16, 2)]}


def test_launches_by_merging_are_those_over_tiles(launches: dict[str, Noted], device: str) -> None:
    way = PrefillWay(OWN, OwnPrefill("merging", 8, 128, 2))
    with config.forced(config.only(read_file(SHIPPED), way)):
        for dtype in (torch.bfloat16, torch.float32):
            tokens = make_tokens(3, device, dims=(64, 64), dtype=dtype)
            run_prefill(tokens, tokens.state(2), [(0, 3, 1)], [False], "triton")
    (chunk,), (walk,) = launches["tiled chunk"].options, launches["tiled walk"].options
    assert (chunk["num_warps"], chunk["maxnreg"], walk["num_stages"]) == (8, 128, 2)
    (plain,) = launches["chunk"].options
    assert (plain["BY_BLOCKS"], plain["num_warps"], plain["maxnreg"]) == (False, 4, None), "as if nothing were said"
    assert [len(launches[name].options) for name in ("gates", "walk")] == [1, 1]


def test_what_is_said_of_a_table_that_names_several_inverses() -> None:
    shipped = config.find(Target("NVIDIA H200", (9, 0))).table
    said = {}
    for name, rules in (("all", shipped.prefill), ("none", read_file(SHIPPED).prefill)):
        with config.forced(replace(shipped, prefill=rules)):
            said[name] = [(one.shapes, one.why) for one in prefill_choices(gpus.NO_GPU)][:3]
    both = (
        PrefillRule(PrefillWay(OWN, OwnPrefill("merging", 4, 168, 3)), 1000, 0, "a test"),
        *read_file(SHIPPED).prefill,
    )
    with config.forced(replace(shipped, prefill=both)):
        first = prefill_choices(gpus.NO_GPU)[0]
    assert said["all"][0] == (
        "bfloat16 tokens, heads of 64 or 128",
        "three kernels over tiles, chunks of 64, products in bfloat16",
    )
    assert [shapes for shapes, _ in said["all"][1:]] == [
        "bfloat16 tokens, heads of another multiple of 64", "other types and heads",
    ]  # fmt: skip
    assert said["none"][0] == (
        "bfloat16 tokens, heads of a multiple of 64",
        "two kernels, chunks of 64, products in bfloat16",
    )
    assert first.why.startswith("three kernels over tiles where the inverse is by merging, else two, ")
    assert [detail.partition(" (")[0] for detail in first.details] == [
        "from 1000 tokens on, 0 a row: own, inverse by merging, 4 warps, 168 registers, 3 stages",
        "from the first token on: own, inverse by doubling, 4 warps, 2 stages",
    ]
