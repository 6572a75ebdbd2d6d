"""What LLaVA's stages share: the final loss of a stage, and LoRA's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evals.vqa.training import Finished, add_lora

from .conftest import PLAN


@pytest.mark.parametrize(("losses", "mean"), [([9.0] * 90 + [1.0] * 10, 1), ([3.0, 1.0], 2)])
def test_the_final_loss_is_of_the_last_tenth_and_of_ten_steps_at_least(
    losses: list[float], mean: float
) -> None:
    assert Finished(PLAN, losses).final_loss == mean


def test_the_seed_decides_loras_weights(make_model: Callable[..., Any]) -> None:
    models = [make_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        add_lora(model, 2, seed)
    first, again, other = (
        torch.cat([w.flatten() for name, w in model.named_parameters() if "lora_A" in name])
        for model in models
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
