"""`make test` runs each engine's tests in that engine's own environment."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def pytest_runs(*arguments: str) -> list[tuple[str, str]]:
    """(environment, first path) of every pytest that make would start; vLLM's first, for they run side by side."""
    own = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ENGINE", "VENV", "USE_ENV", "TESTS"}
    env = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("USE_ENV_")}
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = sorted(done.stdout.splitlines(), key=lambda line: not line.startswith("   vllm |"))
    commands = [line.split(" -m pytest ") for line in lines if " -m pytest " in line]
    runs = [(before.split()[-1].removesuffix("/bin/python"), after.strip()) for before, after in commands]
    return [(environment, tests if "quick" in tests else tests.split()[0]) for environment, tests in runs]


def test_each_engine_has_its_environment() -> None:
    assert pytest_runs("test") == [
        *((".venv/vllm", tests) for tests in ("tests", "tests/e2e")),
        *((".venv/sglang", tests) for tests in ("tests/cpu/sglang", "tests/e2e")),
        *((".venv/sglang-next", tests) for tests in ("tests/cpu/sglang", "tests/e2e -m quick")),
    ]


def test_environments_of_the_users_are_taken_for_their_engine_only() -> None:
    runs = pytest_runs("test", "USE_ENV=/v", "USE_ENV_SGLANG=/s", "USE_ENV_SGLANG_NEXT=/n")
    assert [environment for environment, _ in runs] == ["/v", "/v", "/s", "/s", "/n", "/n"]
    runs = pytest_runs("test", "USE_ENV_VLLM=/v")
    assert [environment for environment, _ in runs] == ["/v"] * 2 + [".venv/sglang"] * 2 + [".venv/sglang-next"] * 2


def test_commands_side_by_side_fail_together() -> None:
    script = [sys.executable, str(ROOT / "tests/side_by_side.py")]
    done = subprocess.run([*script, "a=echo one; exit 3", "b=sleep 0.2; echo two"], capture_output=True, text=True)
    assert done.returncode == 1
    # What failed is shown again where one looks first.
    assert done.stdout.splitlines() == [
        *("      a | one", "      b | two", "      b | passed"),
        *("      a | one", "      a | FAILED with exit code 3"),
    ]
    assert subprocess.run([*script, "a=true", "b=true"], capture_output=True).returncode == 0


def test_one_engine_alone() -> None:
    assert pytest_runs("e2e-tests", "ENGINE=sglang", "USE_ENV=/s") == [("/s", "tests/e2e")]
    assert pytest_runs("engine-tests", "ENGINE=sglang-next")[0] == (".venv/sglang-next", "tests/cpu/sglang")
