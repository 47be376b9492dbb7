"""What a tuning leaves behind: the table as a file, a before/after table for a terminal, lines for a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from qwen3next_plugin.activation import DISTRIBUTION, plugin_version
from qwen3next_plugin.kernels.gdn.choices import tile_text, way_text
from qwen3next_plugin.kernels.gdn.config_file import FORMAT, checked, rule_object
from qwen3next_plugin.kernels.gdn.table import (
    OWN,
    DecodeRule,
    DecodeTile,
    GdnTable,
    PrefillRule,
    PrefillWay,
    StatesRule,
    VerifyRule,
)
from qwen3next_plugin.kernels.gpus import Gpu

from ..session import About
from ..texts import cells_of, line_of, table_for
from .rules import Step, deciding
from .search import Part, Result
from .space import Candidate, Heads


@dataclass(frozen=True)
class Where:
    """What all reasons name: the GPU, the heads of a rank and the day."""

    gpu: Gpu
    heads: Heads
    about: About

    def why(self, part: Part, step: Step[Candidate]) -> str:
        """The shapes that a rule decides on, beside what ran there before or, of a peer, beside our own kernels."""
        said = f"measured on {self.gpu.name} with {self.heads} heads, {self.about.date}"
        at = {one.shape: one.shape.at(self.heads) for one in part.results}
        steps = part.steps if step in part.steps else (*part.others, part.steps[-1])
        decided = [one for one in part.results if deciding(steps, at[one.shape]) is step]
        if not decided:
            return f"{said}: for shapes smaller than those measured, and where no rule before it can run"
        peer = isinstance(step.candidate, PrefillWay) and step.candidate.runs != OWN
        took = [one.times.get(step.candidate, math.inf) for one in decided]
        beside_it = [_own_seconds(one) if peer else one.before_seconds for one in decided]
        ratios = [before / after for before, after in zip(beside_it, took, strict=True)]
        finite = [ratio for ratio in ratios if ratio < math.inf]
        shapes = f"{len(decided)} shape{'s' if len(decided) > 1 else ''}, {decided[0].shape} the smallest"
        if not finite:
            return f"{said}: {shapes}, where nothing ran before"
        speeds = " to ".join(dict.fromkeys((f"{min(finite):.2f}", f"{max(finite):.2f}")))
        beside = "our own kernels" if peer else "what ran before"
        where = "" if step in part.steps else ", where the rules before it cannot run"
        return f"{said}: {shapes}, {speeds} times as fast as {beside}{where}"


def table_from(parts: Sequence[Part], shipped: GdnTable, peers: Sequence[str], where: Where) -> GdnTable:
    """The measured table. What is not measured keeps its shipped rule: peers that are not here, more drafts, and drafts
    that leave a state each."""
    prefill: list[PrefillRule] = [
        replace(rule, why=_as_shipped(rule)) for rule in shipped.prefill if rule.way.runs not in (OWN, *peers)
    ]
    decode: list[DecodeRule] = []
    verify: list[VerifyRule] = []
    for part in parts:
        shape = part.results[0].shape
        for step in (*part.steps[:-1], *part.others, part.steps[-1]):
            found, why, (least, *of_mean) = step.candidate, where.why(part, step), step.least
            if isinstance(found, PrefillWay):
                prefill.append(PrefillRule(found, least, of_mean[0], why))
            elif isinstance(found, DecodeTile):
                decode.append(DecodeRule(shape.state_bytes, least, found, why))
            else:
                verify.append(VerifyRule(shape.state_bytes, shape.tokens, least, found, why))
    measured = {(rule.state_bytes, rule.max_tokens) for rule in verify}
    verify += [
        replace(rule, why=_as_shipped(rule))
        for rule in shipped.verify
        if (rule.state_bytes, rule.max_tokens) not in measured
    ]
    states = tuple(replace(rule, why=_as_shipped(rule)) for rule in shipped.states)
    return checked(GdnTable("measured", tuple(prefill), tuple(decode), tuple(verify), states))


def _as_shipped(rule: PrefillRule | VerifyRule | StatesRule) -> str:
    return f"not measured, as shipped: {rule.why}"


def measured_file(
    table: GdnTable, parts: Sequence[Part], effort: str, missing: dict[str, str], where: Where
) -> dict[str, Any]:
    """The file's content: the kernels read the three lists of rules, the rest says what they rest on."""
    return {
        "format": FORMAT,
        "source": table.source,
        "note": f"measured by {DISTRIBUTION} {plugin_version()}, effort {effort}, {where.about.date}",
        "gpu": {"name": where.gpu.name, "sms": where.gpu.sms},
        "heads": str(where.heads),
        "versions": where.about.versions,
        "missing": missing,
        "prefill": [rule_object(rule) for rule in table.prefill],
        "decode": [rule_object(rule) for rule in table.decode],
        "verify": [rule_object(rule) for rule in table.verify],
        "states": [rule_object(rule) for rule in table.states],
        "measurements": [_measurement(one) for part in parts for one in part.results],
    }


def _measurement(one: Result) -> dict[str, Any]:
    return {
        "shape": str(one.shape),
        "us": _us(one.seconds),
        "runs": text_of(one.chosen),
        "before_us": _us(one.before_seconds),
        "before": text_of(one.before),
        "relative_error": float(f"{one.error:.2e}"),
        "machines": one.machines,
        "all_us": {text_of(candidate): _us(seconds) for candidate, seconds in one.times.items()},
    }


def _us(seconds: float) -> float | None:
    return round(1e6 * seconds, 2) if seconds < math.inf else None


def _own_seconds(one: Result) -> float:
    own = (seconds for way, seconds in one.times.items() if isinstance(way, PrefillWay) and way.runs == OWN)
    return min(own, default=math.inf)


def text_of(candidate: Candidate) -> str:
    """A way or a tile in a few words."""
    return way_text(candidate) if isinstance(candidate, PrefillWay) else tile_text(candidate)


def as_line(one: Result) -> str:
    """One line for a log."""
    return line_of(str(one.shape), one, text_of(one.chosen))


def as_table(parts: Sequence[Part]) -> Table:
    """For a terminal: one row a shape."""
    results = [one for part in parts for one in part.results]
    table = table_for("shape", ["ran before", "runs"], results)
    for one in results:
        before = "" if one.before == one.chosen else text_of(one.before)
        table.add_row(str(one.shape), *cells_of(one), before, text_of(one.chosen))
    return table
