"""Run several commands at once, their lines as they come behind their names: ``side_by_side.py name=command ...``

Ends with 0 if all did; a command that fails does not stop the others. An engine spends most of a test starting, on one
core, so two of them side by side take little longer than one.
"""

import subprocess
import sys
from threading import Lock, Thread

_printing = Lock()


def run(name: str, command: str, codes: dict[str, int]) -> None:
    """Run one command in a shell, its output prefixed, its exit code kept in ``codes``."""
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    for line in process.stdout:
        with _printing:
            print(f"{name:>7} | {line.decode(errors='replace').rstrip()}", flush=True)
    codes[name] = process.wait()


def main(arguments: list[str]) -> int:
    """Exit code of all together."""
    codes: dict[str, int] = {}
    commands = [argument.partition("=")[::2] for argument in arguments]
    threads = [Thread(target=run, args=(name, command, codes)) for name, command in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, code in codes.items():
        print(f"{name:>7} | {'passed' if code == 0 else f'FAILED with exit code {code}'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
