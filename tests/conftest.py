"""The test session: where kernels run, how many examples are tried, what is skipped without a GPU.

On a machine without CUDA the Triton kernels run under Triton's interpreter, which a kernel picks when it is decorated.
The variable is therefore set here, before any module of the project is imported. Engine processes must not inherit
it: start them with `tests.helpers.engine_environment()`. `make test` also runs the end-to-end tests in a pytest of
their own with TRITON_INTERPRET=0.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import helpers

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("quick", max_examples=20, deadline=None, suppress_health_check=_slow_is_fine)
settings.register_profile("ci", settings.get_profile("quick"), derandomize=True, database=None)
settings.register_profile("proof", settings.get_profile("quick"), max_examples=1000, print_blob=True)

PROOF = os.environ.get("PROOF", "0") not in ("", "0")
settings.load_profile("proof" if PROOF else "ci" if os.environ.get("CI") else "quick")


def _has_long_form(item: pytest.Item) -> bool:
    return "proof" in getattr(item, "fixturenames", ()) or hasattr(getattr(item, "obj", None), "hypothesis")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none; leave out what a proof would run as always."""
    if PROOF:
        config.hook.pytest_deselected(items=[item for item in items if not _has_long_form(item)])
        items[:] = [item for item in items if _has_long_form(item)]
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_sessionfinish() -> None:
    """Tell a proof which of the project's files were imported."""
    if target := os.environ.get("PROOF_IMPORTS"):
        root = Path(__file__).resolve().parent.parent
        files = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
        ours = [
            file.resolve().relative_to(root) for file in files if file.is_absolute() and root in file.resolve().parents
        ]
        # An environment in this folder is not the project.
        Path(target).write_text("\n".join(sorted(str(file) for file in ours if not file.parts[0].startswith("."))))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels under test run: "cuda" if there is a GPU, else "cpu" with Triton's interpreter."""
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(scope="session")
def proof() -> bool:
    """True under PROOF=1 (`make proof`): tests that loop on their own take their long form."""
    return PROOF


@pytest.fixture
def nan_like() -> Callable[..., torch.Tensor]:
    """`tests.helpers.nan_like` as a fixture."""
    return helpers.nan_like


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """`tests.helpers.relative_error` as a fixture."""
    return helpers.relative_error
