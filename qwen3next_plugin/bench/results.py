"""The result file: out of a run's state, one file an engine of the plugin's."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from qwen3next_plugin.config import load_spec

from .floors import floor_of
from .rows import Engine, Row, Visit
from .state import FORMAT, complete_rows

Values = dict[str, list[float]]


def side_values(session: dict[str, Any], side: str, row: Row) -> Values:
    """All repeats of a side's visits by result row name."""
    values: Values = {name: [] for name in row.result_names}
    for visit in session["visits"].values():
        if visit["side"] != side:
            continue
        for repeat in visit["rows"].get(row.name, ()):
            if row.kind == "traffic":
                for metric, value in repeat["values"].items():
                    values[f"{row.name}-{metric}"].append(value)
            else:
                values[row.name].append(repeat["value"])
    return values


def spread_of(values: list[float]) -> float | None:
    """(largest - smallest) / median."""
    return None if not values else (max(values) - min(values)) / median(values)


def assemble(
    state: dict[str, Any], model: Path, visits: list[Visit], engine: Engine, about: dict[str, Any]
) -> dict[str, Any]:
    """The content of the result file for the plugin in ``engine``.

    A row is taken from the first session that has it complete, else from the one that has most of it; a side not
    measured is null there, and `check` says so. ``about``: what else the file's head says (command, commit ...).
    """
    plan = state["plan"]
    rows = list(dict.fromkeys(row for visit in visits for row in visit.rows if row.kind != "profile"))
    sessions = [s for s in state["sessions"] if engine in s["about"]]
    out: list[dict[str, Any]] = []
    for row in rows:
        if not sessions:
            break
        number = _session_for(sessions, visits, row, plan["repeats"])
        out += _rows_of(sessions, number, row, engine, model, plan)
    return {
        "format": FORMAT,
        **about,
        "plan": plan,
        "sessions": [
            {
                "gpu": session["about"][engine]["gpu"],
                "engines": {
                    name: {key: value for key, value in told.items() if key != "machine"}
                    for name, told in session["about"].items()
                },
            }
            for session in sessions
        ],
        "sides": _sides(sessions),
        "relative_logit_error": _logit_errors(sessions),
        "profiles": _profiles(sessions),
        "rows": out,
    }


def _session_for(sessions: list[dict[str, Any]], visits: list[Visit], row: Row, repeats: int) -> int:
    for n, session in enumerate(sessions):
        if row.name in complete_rows(session, visits, repeats):
            return n
    return max(
        range(len(sessions)),
        key=lambda n: sum(len(v["rows"].get(row.name, ())) for v in sessions[n]["visits"].values()),
    )


def _sides(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Arguments, environment and facts of every side, once each: the same in all of its visits, or a list."""
    found: dict[str, Any] = {}
    for n, session in enumerate(sessions):
        for name, visit in session["visits"].items():
            kind = "evidence" if "-evidence-" in name else "timed"
            entry = {key: visit[key] for key in ("arguments", "environment", "facts")}
            known = found.setdefault(visit["side"], {}).setdefault(kind, [])
            for other in known:
                if {k: other[k] for k in entry} == entry:
                    other["visits"].append(f"{n}:{name}")
                    break
            else:
                known.append({"visits": [f"{n}:{name}"], **entry})
    return found


def _logit_errors(sessions: list[dict[str, Any]]) -> dict[str, float | None]:
    """The largest of each side's visits, those with graphs before those without."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for session in sessions:
        for name, visit in session["visits"].items():
            if visit.get("relative_logit_error") is not None:
                found.setdefault(visit["side"], []).append(("-evidence-" not in name, visit["relative_logit_error"]))
    return {side: _rounded(max(errors)[1]) for side, errors in found.items()}


def _profiles(sessions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Profiles by row and side, the last one made of each."""
    found: dict[str, dict[str, Any]] = {}
    for session in sessions:
        for visit in session["visits"].values():
            for name, repeats in visit["rows"].items():
                if name.startswith("profile-") and repeats:
                    found.setdefault(name.removeprefix("profile-"), {})[visit["side"]] = repeats[-1]["profile"]
    return found


def _rows_of(
    sessions: list[dict[str, Any]], number: int, row: Row, engine: Engine, model: Path, plan: dict[str, Any]
) -> list[dict[str, Any]]:
    session = sessions[number]
    about = session["about"][engine]
    sides = {name: side_values(session, name, row) for name in ("stock-vllm", "stock-sglang", f"plugin-{engine}")}
    experts = {
        visit["side"]: round(visit["evidence"][row.name]["mean"], 3)
        for other in [*sessions, session]  # its own counts last, so that they stand
        for visit in other["visits"].values()
        if row.name in visit["evidence"]
    }
    facts: dict[str, Any] = next(
        (v["facts"] for v in session["visits"].values() if v["side"] == f"plugin-{engine}"), {}
    )
    touched = experts.get(f"plugin-{engine}")
    floor = floor_of(row, load_spec(model), about["ceilings"], facts, touched, plan["steps"])
    clients: Values = {}
    for visit in session["visits"].values():
        gaps = [r["client"] for r in visit["rows"].get(row.name, ()) if r.get("client") is not None]
        clients.setdefault(visit["side"], []).extend(gaps)
    result = []
    for name in row.result_names:
        values = {side: found[name] for side, found in sides.items()}
        medians = {side: _rounded(median(v)) if v else None for side, v in values.items()}
        stock = [m for side, m in medians.items() if side.startswith("stock") and m is not None]
        plugin = medians[f"plugin-{engine}"]
        result.append(
            {
                "case": name,
                "unit": row.unit,
                "session": number,
                "stock": min(stock, default=None),
                "plugin": plugin,
                "stock_vllm": medians["stock-vllm"],
                "stock_sglang": medians["stock-sglang"],
                "repeats": {side: [_rounded(v) for v in found] for side, found in values.items() if found},
                "spread": {side: _rounded(spread_of(found)) for side, found in values.items() if found},
                "floor": _rounded(floor),
                "share_of_floor": _rounded(floor / plugin) if floor and plugin else None,
                "distinct_experts": experts,
                "client_ms": {side: _rounded(median(gaps)) for side, gaps in clients.items() if gaps},
            }
        )
    return result


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def told_command(words: Sequence[str]) -> str:
    """A command of this program as files keep it: absolute paths, which say something of a machine, cut down to their
    last part.
    """
    return " ".join(["qwen3next", *(shlex.quote(_without_folders(word)) for word in words)])


def _without_folders(word: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", word)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file: one line a row would be hard to read, so lists of numbers alone are kept on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+((?:-?[\d.e+-]+,?\s+)+)\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    path.write_text(text + "\n", encoding="utf-8")
