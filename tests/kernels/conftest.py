"""What kernel tests share beyond the session's fixtures."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Everything torch allocates uninitialised holds NaN (integers: their largest value), so that what an operation
    forgets to write, or reads before it is written, shows in its results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
