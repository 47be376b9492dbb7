"""The helpers every other test trusts."""

import pytest
import torch

from tests.helpers import TEST_ONLY_VARIABLES, engine_environment, nan_like, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_poison_is_nan_in_every_floating_type(dtype: torch.dtype) -> None:
    assert nan_like(3, 4, dtype=dtype).float().isnan().all()
    assert nan_like(torch.zeros(5, dtype=dtype)).float().isnan().all()


def test_poison_keeps_strides_and_marks_integers() -> None:
    source = torch.zeros(4, 6).t()
    assert nan_like(source).stride() == source.stride()
    assert nan_like(2, dtype=torch.int32).tolist() == [torch.iinfo(torch.int32).min] * 2


def test_relative_error_sees_scale_nan_and_zero_reference() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(reference.float(), reference) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), reference) == float("inf")
    assert relative_error(torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64)) == pytest.approx(0.5)


def test_relative_error_refuses_a_reference_below_float64_and_other_shapes() -> None:
    with pytest.raises(AssertionError, match="float64"):
        relative_error(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="shapes differ"):
        relative_error(torch.ones(2), torch.ones(2, 1, dtype=torch.float64))


def test_engines_do_not_inherit_what_steers_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TEST_ONLY_VARIABLES:
        monkeypatch.setenv(name, "1")
    environment = engine_environment(PORT="1")
    assert not set(TEST_ONLY_VARIABLES) & set(environment)
    assert environment["PORT"] == "1" and "PATH" in environment
