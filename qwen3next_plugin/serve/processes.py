"""A child with its own process group: everything it starts ends with it, and nothing else does."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS_TO_LEAVE = 20.0


def stop_on_termination() -> None:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that children are stopped.

    Ctrl-C itself is set too: what a shell starts in the background begins with SIGINT ignored, children included.
    """

    def unwind(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, unwind)
    signal.signal(signal.SIGTERM, unwind)
    signal.signal(signal.SIGHUP, unwind)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a whole group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def stop(process: "subprocess.Popen[bytes]", seconds: float = SECONDS_TO_LEAVE) -> None:
    """End a process and its group: ask it (SIGINT), insist (SIGTERM, SIGKILL) after `seconds`, and wait for it.

    A second Ctrl-C while waiting kills at once. The group's id is the process id (start_new_session); it stays taken
    while any member lives.
    """
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if _gone(process, number, seconds):
                break
    finally:
        _gone(process, signal.SIGKILL, seconds)
        process.wait()


def _gone(process: "subprocess.Popen[bytes]", number: int, seconds: float) -> bool:
    """Signal the group and wait until nobody is left in it, at most `seconds`."""
    if not signal_group(process.pid, number):
        return True
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        process.poll()  # reaps the leader, which would otherwise count as a member for ever
        if not signal_group(process.pid, 0):
            return True
        time.sleep(0.05)
    return False


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command with its output appended to `log`; on leaving, it and all it started are gone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(os.environ if env is None else env),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)
