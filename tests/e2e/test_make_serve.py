"""`make serve ONCE=1` as a newcomer runs it, with the real engine and the demo model."""

import subprocess
import sys
from pathlib import Path

from .server import engine, environment, free_port

ROOT = Path(__file__).resolve().parents[2]


def test_make_serve_answers_and_leaves() -> None:
    own = [
        f"USE_ENV={sys.prefix}",
        f"PYTHON={sys.executable}",
        f"PORT={free_port()}",
        "ONCE=1",
        "DEVICE=cpu",
        f"ENGINE={engine().name}",
    ]
    done = subprocess.run(
        ["make", "serve", *own], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "qwen3next-plugin" in done.stdout and f" active: {engine().name} " in done.stdout
    assert "Answer:   The capital of France is Paris." in done.stdout
