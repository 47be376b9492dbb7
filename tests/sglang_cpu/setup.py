"""Builds the wheel, or refuses: never where the packages are that this one stands in for."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from qwen3next_sglang_cpu_standins.guard import why_not  # noqa: E402

HOOK = "qwen3next_sglang_cpu_standins.pth"

if refusal := why_not():
    sys.exit(f"\n{refusal}\n")


class BuildWithHook(build_py):
    """Puts the start-up line beside the packages: it is what makes ``import sgl_kernel`` find the stand-in."""

    def run(self) -> None:
        super().run()
        self.copy_file(str(HERE / HOOK), str(Path(self.build_lib) / HOOK))


setup(cmdclass={"build_py": BuildWithHook})
