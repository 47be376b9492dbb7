"""What a run has measured so far, on disk after every repeat, so that a machine that goes away takes nothing with it.

Sides are compared only within one *session*: one start of one machine. A run that is taken up on another machine opens
another session, measures there what no earlier session has complete, and keeps the rest. What is no comparison of
times, the experts that were counted and the profiles, is kept whichever session it is from.
"""

import json
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError

from .rows import Row, Visit

FORMAT = 1


class State:
    """Sessions by machine: ``{"machine": ..., "about": {engine: ceilings and versions}, "visits": {name: visit}}``.

    A visit: ``{"side", "turn", "cold", "facts", "arguments", "environment", "rows": {name: [repeat, ...]},
    "evidence": {row: counts}}``.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        """Takes up what is at ``path``. Raises SettingsError if that was another plan, whose numbers do not compare."""
        self.path = path
        self.data: dict[str, Any] = {"format": FORMAT, "plan": plan, "sessions": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            old = self.data["plan"]
            changed = sorted(key for key in old.keys() | plan.keys() if old.get(key) != plan.get(key))
            if changed:
                raise SettingsError(
                    f"{path} holds a run with another {' and '.join(changed)}: give the same, or another --state."
                )

    def session(self, machine: str) -> dict[str, Any]:
        """This machine's session, opened if it is new."""
        for session in self.data["sessions"]:
            if session["machine"] == machine:
                found: dict[str, Any] = session
                return found
        session = {"machine": machine, "about": {}, "visits": {}}
        self.data["sessions"].append(session)
        return session

    def save(self) -> None:
        """Writes the file in one go: never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        part.replace(self.path)


def repeats_wanted(row: Row, repeats: int) -> int:
    """A server starts once a visit, and is profiled once; everything else is repeated."""
    return 1 if row.kind in ("start", "profile") else repeats


def row_done(visit: dict[str, Any] | None, row: Row, repeats: int) -> bool:
    """Whether a visit has all repeats of a row."""
    return visit is not None and len(visit["rows"].get(row.name, ())) >= repeats_wanted(row, repeats)


def left_to_do(session: dict[str, Any], visits: list[Visit], repeats: int) -> list[tuple[Visit, list[Row]]]:
    """Visits that still have rows to measure in this session, with those rows."""
    todo = []
    for visit in visits:
        known = session["visits"].get(visit.name)
        if visit.evidence:
            rows = [row for row in visit.rows if known is None or row.name not in known["evidence"]]
        else:
            rows = [row for row in visit.rows if not row_done(known, row, repeats)]
        if rows:
            todo.append((visit, rows))
    return todo


def told_by(sessions: list[dict[str, Any]], visit: Visit, row: Row) -> bool:
    """Whether one of ``sessions`` has this side's counts or profile of a row; False for times."""
    mine = [known for session in sessions for known in session["visits"].values() if known["side"] == visit.side.name]
    if visit.evidence:
        return any(row.name in known["evidence"] for known in mine)
    return row.kind == "profile" and any(known["rows"].get(row.name) for known in mine)


def complete_rows(session: dict[str, Any], visits: list[Visit], repeats: int) -> set[str]:
    """Names of rows that every timed visit of the session has."""
    timed = [visit for visit in visits if not visit.evidence]
    missing = {row.name for _, rows in left_to_do(session, timed, repeats) for row in rows}
    return {row.name for visit in timed for row in visit.rows} - missing
