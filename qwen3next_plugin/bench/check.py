"""Which result files may be believed: both sides alike in all but the plugin, and nothing left out.

Only what is listed here may differ between the two sides of a row; a file that breaks a rule gets one sentence a row.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .engines import SIDE_VARIABLE
from .kernels.check import KINDS, check_parts
from .state import FORMAT

MAY_DIFFER = {SIDE_VARIABLE}
"""Environment variables in which the sides may differ. No flag may."""

FACTS_ALIKE = (
    *("dtype", "kv_dtype", "ssm_state_dtype", "quantization"),
    *("max_num_seqs", "max_num_batched_tokens", "prefix_caching"),
)
"""What the engines made of their flags and has to be the same on both sides."""

FACTS_NEEDED = ("dtype", "kv_dtype", "ssm_state_dtype", "graph_mode", "model_class")
EXPERTS_TOLERANCE = 0.02
LEAST_REPEATS = 3

_HEAD = ("command", "commit", "plugin_version", "model", "plan", "sessions", "sides", "rows", "relative_logit_error")
_ROW = ("case", "unit", "session", "stock", "plugin", "stock_vllm", "stock_sglang", "repeats", "spread")
_ROW_MORE = ("floor", "share_of_floor", "distinct_experts")
_CEILINGS = ("copy_gb_s", "bf16_tflop_s")


def check_file(path: Path) -> list[str]:
    """What is wrong with a result file, a sentence each; empty if nothing is. Files of other kinds have no "rows"."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read: {error}."]
    if not isinstance(result, dict) or "rows" not in result:
        return []  # a training log, a profile: no comparison
    check = check_parts if result.get("kind") in KINDS else check_result
    return [f"{path}: {finding}" for finding in check(result)]


def check_result(result: dict[str, Any]) -> list[str]:
    """The same for the content of one."""
    if result.get("format") != FORMAT:
        return [f"format is {result.get('format')!r}: {FORMAT} is what this version reads."]
    missing = [key for key in _HEAD if key not in result]
    if missing:
        return [f"{key} is missing." for key in missing]
    engine = _engine_of(result)
    if engine is None:
        return ["sides: there must be exactly one plugin side."]
    findings = list(_head_findings(result, engine))
    for row in result["rows"]:
        findings += [f"{row.get('case', 'a row')}: {finding}" for finding in _row_findings(row, result, engine)]
    return findings


def _engine_of(result: dict[str, Any]) -> str | None:
    names = [side.removeprefix("plugin-") for side in result["sides"] if side.startswith("plugin-")]
    return names[0] if len(names) == 1 else None


def _head_findings(result: dict[str, Any], engine: str) -> Iterator[str]:
    if not result["commit"]:
        yield "commit is empty: say which commit was measured (--commit)."
    elif result["commit"].endswith("+changes"):
        yield "commit: the checkout had changes that no commit holds."
    if not result["rows"]:
        yield "rows: there is none."
    for session in result["sessions"]:
        about = session["engines"].get(engine, {})
        if not about.get("gpu") or not about.get("versions", {}).get("torch"):
            yield "sessions: GPU and versions are not all there."
        if any(not about.get("ceilings", {}).get(key) for key in _CEILINGS):
            yield "sessions: the ceilings of copying and of matrix products were not measured."
    plugin, stock = f"plugin-{engine}", f"stock-{engine}"
    for side in (plugin, stock):
        if result["relative_logit_error"].get(side) is None:
            yield f"relative_logit_error: {side} was not compared with the oracle."
    if stock not in result["sides"]:
        yield f"sides: {stock} was not measured."
        return
    for kind in ("timed", "evidence"):
        yield from _side_findings(result["sides"][plugin].get(kind, []), result["sides"][stock].get(kind, []), kind)


def _side_findings(plugin: list[dict[str, Any]], stock: list[dict[str, Any]], kind: str) -> Iterator[str]:
    if not plugin or not stock:
        yield f"sides: one of the two was not visited ({kind})."
        return
    if len(plugin) > 1 or len(stock) > 1:
        yield f"sides: a side ran with several sets of flags, variables or facts ({kind})."
    for one in plugin:
        for other in stock:
            yield from (f"{difference} ({kind})." for difference in differences(one, other))
    for name, side in (("plugin", plugin[0]), ("stock", stock[0])):
        absent = [fact for fact in FACTS_NEEDED if side["facts"].get(fact) is None]
        if absent:
            yield f"sides: {', '.join(absent)} of the {name} side is not known ({kind})."
    if "qwen3next_plugin" in str(stock[0]["facts"].get("model_class")):
        yield f"sides: the stock side ran the plugin's model ({kind})."
    if "qwen3next_plugin" not in str(plugin[0]["facts"].get("model_class")):
        yield f"sides: the plugin side ran another model than the plugin's ({kind})."


def differences(plugin: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """In what two sides differ beyond `MAY_DIFFER`, a phrase each."""
    found = []
    if plugin["arguments"] != stock["arguments"]:
        only = [word for word in plugin["arguments"] if word not in stock["arguments"]]
        only += [word for word in stock["arguments"] if word not in plugin["arguments"]]
        found.append(f"arguments differ: {' '.join(only) or 'in their order'}")
    for name in sorted(plugin["environment"].keys() | stock["environment"].keys()):
        one, other = plugin["environment"].get(name), stock["environment"].get(name)
        if one != other and name not in MAY_DIFFER:
            found.append(f"environment differs: {name} is {one!r} with the plugin and {other!r} without")
    for name in FACTS_ALIKE:
        one, other = plugin["facts"].get(name), stock["facts"].get(name)
        if one != other:
            found.append(f"facts differ: {name} is {one!r} with the plugin and {other!r} without")
    return found


def _row_findings(row: dict[str, Any], result: dict[str, Any], engine: str) -> Iterator[str]:
    missing = [key for key in (*_ROW, *_ROW_MORE) if key not in row]
    if missing:
        yield f"{', '.join(missing)} missing."
        return
    plugin, stock = f"plugin-{engine}", f"stock-{engine}"
    start = row["case"].endswith("-start")
    for side in (plugin, stock):
        count = len(row["repeats"].get(side, ()))
        least = 1 if start else LEAST_REPEATS
        if count < least:
            yield f"{count} repeats of {side}, {least} are wanted."
    peers = [value for value in (row["stock_vllm"], row["stock_sglang"]) if value is not None]
    if row["stock"] != min(peers, default=None):
        yield "stock is not the faster of the stock engines."
    if not 0 <= row["session"] < len(result["sessions"]):
        yield f"session {row['session']} is not in the file."
    if row["case"].startswith(("decode-", "prefill-")):
        yield from _expert_findings(row["distinct_experts"], plugin, stock)
        if row["floor"] is None:
            yield "the floor is missing."
        elif row["plugin"] is not None and row["plugin"] < 0.95 * row["floor"]:
            yield f"{row['plugin']} {row['unit']} is faster than the floor of {row['floor']}: floor or clock are wrong."


def _expert_findings(experts: dict[str, float], plugin: str, stock: str) -> Iterator[str]:
    one, other = experts.get(plugin), experts.get(stock)
    if one is None or other is None:
        yield "distinct experts were not counted on both sides."
    elif abs(one - other) > EXPERTS_TOLERANCE * other:
        yield f"{one} distinct experts a layer with the plugin and {other} without: more than 2 % apart."


def result_files(paths: Iterable[Path]) -> list[Path]:
    """JSON files among and below ``paths``; states of unfinished runs are none."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return [path for path in found if not path.name.endswith(".state.json")]
