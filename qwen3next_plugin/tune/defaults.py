"""Config files for GPUs that nobody measured, computed from their properties; they say so."""

from collections.abc import Iterator
from pathlib import Path

from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import read_file
from qwen3next_plugin.spec import Qwen3NextSpec

from .files import as_text, write_atomically
from .problem import MODES, Problem, problem_of
from .result import model_file

SIZES = (("--tp", (1, 2, 4, 8)), ("--ep", (2, 4, 8)))


def usual_problems(spec: Qwen3NextSpec) -> Iterator[tuple[str, Problem]]:
    """What is served on one node: the flags that ask for it, and each rank's problem."""
    for flag, sizes in SIZES:
        for size in sizes:
            for mode in MODES:
                tensor, expert = (size, 1) if flag == "--tp" else (1, size)
                yield f"{flag} {size}", problem_of(spec, tensor, expert, mode)


def computed_files(spec: Qwen3NextSpec) -> Iterator[tuple[Path, str]]:
    """<gpu>/<file> and its content, for every known GPU."""
    for folder, gpu in KNOWN.items():
        for ranks, problem in usual_problems(spec):
            yield Path(folder) / problem.file_name, as_text(model_file(gpu, problem, ranks))


def compute_files(out: Path, spec: Qwen3NextSpec) -> list[Path]:
    """Writes them below `out`, except where there is a measured one. Raises SettingsError if they cannot be written."""
    written = []
    for name, text in computed_files(spec):
        path = out / name
        if path.is_file() and read_file(path).source == "measured":
            continue
        write_atomically(path, text)
        written.append(path)
    return written
