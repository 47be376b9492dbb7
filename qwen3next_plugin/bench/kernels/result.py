"""The result file of one machine: what the runs with its engines measured, side by side.

Of what was measured in several runs the slowest is shown, of the engines' own the fastest: whatever the figures leave
open is counted against this project.
"""

from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError

from .bounds import OWN, fastest, share_of_ceiling
from .cases import ALL_CASES

_DETAILS = ("repeats", "spread", "relative_error", "timed")
_ALIKE = ("commit", "plugin_version", "gpu")

Part = tuple[str, dict[str, Any], dict[str, Any]]
"""An engine, what its run's state says about itself, and its row of a case."""


def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the result file of some states. Raises SettingsError for states that do not compare."""
    engines = [state["engine"] for state in states]
    if len(set(engines)) != len(engines):
        raise SettingsError(f"two state files are of one engine ({', '.join(engines)}): give one an engine.")
    for key in ("format", "kind", "machine", *_ALIKE):
        if len({state.get(key, state["about"].get(key)) for state in states}) != 1:
            raise SettingsError(f"the state files differ in their {key}: what they measured does not compare.")
    first = states[0]
    done = dict.fromkeys(case for state in states for case, row in state["rows"].items() if row["done"])
    usual = {case: place for place, case in enumerate(ALL_CASES[first["kind"]])}
    cases = sorted(done, key=lambda case: usual.get(case, len(usual)))  # whatever was most urgent to measure
    parts = {
        case: [(state["engine"], state["about"], state["rows"][case]) for state in states if case in state["rows"]]
        for case in cases
    }
    return {
        "format": first["format"],
        "kind": first["kind"],
        **{key: first["about"][key] for key in _ALIKE},
        "runs": [
            {"engine": state["engine"]} | {key: value for key, value in state["about"].items() if key not in _ALIKE}
            for state in states
        ],
        "rows": [_row(case, parts[case]) for case in cases],
    }


def _row(case: str, parts: list[Part]) -> dict[str, Any]:
    first = next((row for _, _, row in parts if "unit" in row), None)
    if first is None:  # no run could even make its inputs
        return {"case": case, "why": {f"own@{engine}": row["series"]["own"]["why"] for engine, _, row in parts}}
    series: dict[str, dict[str, Any]] = {}
    for engine, _, row in parts:
        series |= {f"{name}@{engine}" if name in OWN else name: found for name, found in row["series"].items()}
    peers = {name: one for name, one in series.items() if "@" not in name}
    entry: dict[str, Any] = {"case": case}
    entry |= {key: first[key] for key in ("unit", "work", "bytes", "flops", "products", "copies")}
    entry["plugin_is"] = {engine: _plugin_series(row, engine) for engine, _, row in parts}
    plugins = [series.get(name, {}).get("value") for name in entry["plugin_is"].values()]
    entry["own"] = _slowest(series, "own")[1]
    entry["plugin"] = None if None in plugins else max(value for value in plugins if value is not None)
    entry["stock"], entry["peer"] = fastest(peers, "routed")
    if any(one.get("does") == "joined" for one in series.values()):
        entry["stock_joined"], entry["peer_joined"] = fastest(peers, "joined")
    entry["peers"] = {
        name: {key: value for key, value in one.items() if key not in _DETAILS} for name, one in peers.items()
    }
    name, value = _slowest(series, first["share_of"])
    entry |= {"share_of": name, "share_of_ceiling": None, "bound_by": None}
    for engine, about, _ in parts:
        if value is not None and name.endswith(f"@{engine}"):
            entry["share_of_ceiling"], entry["bound_by"] = share_of_ceiling(entry, value, about["ceilings"])
    measured = {name: one for name, one in series.items() if one["value"] is not None}
    entry |= {key: {name: one[key] for name, one in measured.items()} for key in _DETAILS}
    profiles = {f"{name}@{engine}": one for engine, _, row in parts for name, one in row.get("profile", {}).items()}
    if profiles:
        entry["profile"] = profiles
    entry["why"] = {name: one["why"] for name, one in series.items() if one["value"] is None}
    return entry | first["facts"]


def _plugin_series(row: dict[str, Any], engine: str) -> str:
    """What the model runs inside this engine."""
    if row.get("engine_runs"):
        return engine
    return f"plugin@{engine}" if "plugin" in row["series"] else f"own@{engine}"


def _slowest(series: dict[str, dict[str, Any]], kind: str) -> tuple[str, float | None]:
    """Name and value of the slowest run of "own" or "plugin"."""
    values = {
        name: one["value"] for name, one in series.items() if name.startswith(f"{kind}@") and one["value"] is not None
    }
    name = max(values, key=lambda one: values[one], default=kind)
    return name, values.get(name)


def states_beside(path: Path, kind: str) -> list[Path]:
    """State files of all engines for one result file, ``<folder>/<kind>.<engine>.state.json``."""
    return sorted(path.parent.glob(f"{kind}.*.state.json"))
