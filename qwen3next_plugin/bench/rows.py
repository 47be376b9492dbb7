"""What is measured: rows by their names, and in which order the sides take their turns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen3next_plugin.errors import SettingsError

Kind = Literal["decode", "prefill", "start", "traffic", "profile"]
Engine = Literal["vllm", "sglang"]

PROMPT_TOKENS = 1024
"""Prompt of every decoding and traffic request."""

TRAFFIC_METRICS = ("ttft-p50", "ttft-p99", "itl-p50", "itl-p99")

ALL_ROWS = (
    *(f"decode-b{batch}" for batch in (1, 8, 32, 128, 256)),
    *(f"prefill-{tokens}" for tokens in (4096, 32768, 131072)),
    "cold-start",
    "warm-start",
    "traffic-4",
)

_PATTERNS: tuple[tuple[str, Kind], ...] = (
    (r"decode-b([1-9]\d*)", "decode"),
    (r"prefill-([1-9]\d*)", "prefill"),
    (r"(cold|warm)-start", "start"),
    (r"traffic-(\d+(?:\.\d+)?)", "traffic"),
)


@dataclass(frozen=True)
class Row:
    """One thing to measure. ``size``: requests (decode), prompt tokens (prefill) or requests a second (traffic)."""

    name: str
    kind: Kind
    size: float = 0.0

    @property
    def unit(self) -> str:
        """ms for decode and traffic, s for prefill and starts."""
        return "ms" if self.kind in ("decode", "traffic") else "s"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each request's prompt."""
        return int(self.size) if self.kind == "prefill" else PROMPT_TOKENS

    @property
    def result_names(self) -> tuple[str, ...]:
        """The rows of the result file that come of it."""
        if self.kind == "profile":
            return ()
        return tuple(f"{self.name}-{m}" for m in TRAFFIC_METRICS) if self.kind == "traffic" else (self.name,)

    @property
    def profiled(self) -> "Row":
        """The row that a profile is of."""
        return _row(self.name.removeprefix("profile-"))


def parse_rows(text: str) -> list[Row]:
    """Rows from names with commas between; "all" stands for `ALL_ROWS`. Raises SettingsError for a name unknown."""
    names = (
        ALL_ROWS if text == "all" else tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    )
    return [_row(name) for name in names]


def parse_profiles(text: str) -> list[Row]:
    """Profiles of decode and prefill rows, from their names with commas between. Raises SettingsError for others."""
    rows = parse_rows(text) if text else []
    if any(row.kind not in ("decode", "prefill") for row in rows):
        raise SettingsError(f"--profile: {text!r}: decode-b<requests> and prefill-<tokens> can be profiled.")
    return [Row(f"profile-{row.name}", "profile", row.size) for row in rows]


def _row(name: str) -> Row:
    for pattern, kind in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match is not None:
            row = Row(name, kind, 0.0 if kind == "start" else float(match[1]))
            if kind == "traffic" and row.size == 0:
                break
            return row
    raise SettingsError(
        f"--rows: {name!r} is no row: use decode-b<requests>, prefill-<tokens>, cold-start, warm-start or "
        "traffic-<requests a second>."
    )


@dataclass(frozen=True, order=True)
class Side:
    """An engine with the plugin or without."""

    engine: Engine
    plugin: bool

    @property
    def name(self) -> str:
        """``stock-vllm``, ``plugin-sglang`` ..."""
        return f"{'plugin' if self.plugin else 'stock'}-{self.engine}"


@dataclass(frozen=True)
class Visit:
    """One process of one side, from its start to its end; ``turn`` counts the visits of its engine."""

    side: Side
    turn: int
    rows: tuple[Row, ...]
    cold: bool
    evidence: bool = False

    @property
    def name(self) -> str:
        """Unique in a run: ``vllm-1-stock``, ``vllm-evidence-plugin`` ..."""
        turn = "evidence" if self.evidence else str(self.turn + 1)
        return f"{self.side.engine}-{turn}-{'plugin' if self.side.plugin else 'stock'}"


def plan_visits(
    engines: list[Engine], order: str, rows: list[Row], evidence: bool, profiles: Sequence[Row] = ()
) -> list[Visit]:
    """The visits of a run, engine by engine. ``order``: A is stock, B the plugin, e.g. "A-B-A".

    A side's first visit starts with empty caches. A side that has but one visit and a warm start to show gets another
    at the end. Profiles are made in each side's last timed visit, after its rows. With ``evidence`` each side is
    visited once more, without graphs, to count experts.
    """
    letters = order.upper().split("-")
    if not set(letters) <= {"A", "B"} or not letters:
        raise SettingsError(f"--order: {order!r} means nothing: give A (stock) and B (plugin) with dashes, e.g. A-B-A.")
    timed = tuple(row for row in rows if row.kind != "start")
    starts = {row.name: row for row in rows if row.kind == "start"}
    visits: list[Visit] = []
    for engine in engines:
        seen: dict[bool, int] = {}
        turns = [letter == "B" for letter in letters]
        if "warm-start" in starts:
            turns += [plugin for plugin in dict.fromkeys(turns) if turns.count(plugin) == 1]
        for turn, plugin in enumerate(turns):
            cold = not seen.get(plugin)
            seen[plugin] = 1
            start = starts.get("cold-start" if cold else "warm-start")
            # The start comes first: what follows may be taken up again later, in a server started anew.
            mine = ((start,) if start else ()) + (timed if turn < len(letters) else ())
            mine += tuple(profiles) if plugin not in turns[turn + 1 :] else ()
            if mine:
                visits.append(Visit(Side(engine, plugin), turn, mine, cold))
        if evidence:
            wanted = tuple(row for row in timed if row.kind in ("decode", "prefill"))
            visits += [Visit(Side(engine, p), len(turns), wanted, False, True) for p in dict.fromkeys(turns) if wanted]
    return visits
