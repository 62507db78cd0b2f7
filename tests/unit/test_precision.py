"""What "auto" takes on processors that multiply exactly at one setting and not at another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from counterfake import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("errors", "taken"),
    [
        ({"medium": 1e-6, "high": 1e-6}, "medium"),  # AMD without units for bf16 products of fp32
        ({"medium": 1e-2, "high": 1e-6}, "high"),
        ({"medium": 1e-2, "high": 1e-3}, "highest"),  # a GPU with tensor cores
    ],
)
def test_auto_is_the_lowest_setting_that_is_still_fp32(
    errors: dict[str, float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        precision, "matmul_error", lambda device: errors[torch.get_float32_matmul_precision()]
    )
    assert precision.set_matmul("auto", CPU) == taken
    assert torch.get_float32_matmul_precision() == taken


def test_here_auto_multiplies_as_fp32_does() -> None:
    precision.set_matmul("auto", CPU)
    assert 1e-8 < precision.matmul_error(CPU) <= precision.FP32_ERROR


@pytest.mark.parametrize("wanted", ["highest", "medium"])
def test_what_is_asked_for_is_set(wanted: precision.Matmul) -> None:
    assert precision.set_matmul(wanted, CPU) == wanted == torch.get_float32_matmul_precision()


def test_what_was_set_for_a_training_ends_with_it() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ValueError, match="stopped"), precision.restored():
        precision.set_matmul("medium", CPU)
        raise ValueError("stopped")
    assert torch.get_float32_matmul_precision() == "high"
