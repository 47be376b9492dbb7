"""Run several commands at once, their lines as they come behind their names: ``side_by_side.py name=command ...``

Ends with 0 if all did; a command that fails does not stop the others, and its last lines are shown again at the end.
An engine spends most of a test starting, on one core, so two of them side by side take little longer than one.
"""

import subprocess
import sys
from collections import deque
from threading import Lock, Thread

LINES_AGAIN = 20
"""Of a command that failed: pytest's summary, a compiler's last words."""

_printing = Lock()


def run(name: str, command: str, codes: dict[str, int], ends: dict[str, deque[str]]) -> None:
    """Run one command in a shell, its output prefixed, its exit code kept in ``codes``, its last lines in ``ends``."""
    end = ends.setdefault(name, deque(maxlen=LINES_AGAIN))
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for raw in process.stdout:
        line = f"{name:>7} | {raw.decode(errors='replace').rstrip()}"
        end.append(line)
        with _printing:
            print(line, flush=True)
    codes[name] = process.wait()


def main(arguments: list[str]) -> int:
    """Exit code of all together."""
    codes: dict[str, int] = {}
    ends: dict[str, deque[str]] = {}
    commands = [argument.partition("=")[::2] for argument in arguments]
    threads = [Thread(target=run, args=(name, command, codes, ends)) for name, command in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, code in sorted(codes.items(), key=lambda item: item[1] != 0):
        print(*(ends[name] if code else ()), sep="\n", end="\n" if code else "")
        print(f"{name:>7} | {'passed' if code == 0 else f'FAILED with exit code {code}'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
