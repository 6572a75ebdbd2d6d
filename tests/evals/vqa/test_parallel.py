"""A batch without images under DDP; the ranks themselves are in tests/e2e/test_vqa.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evals.vqa.language import LanguageModel
from evals.vqa.llava import make_llava
from evals.vqa.training import projector_in_every_batch


def test_the_projector_gets_a_gradient_of_zero(backbone: Callable[..., Any], tiny: LanguageModel) -> None:
    model = make_llava(backbone(), tiny, (32, 32), 4, layer_norm=False, seed=0)
    ids = torch.tensor([[1, 5, 6, 7]])
    weights = list(model.model.multi_modal_projector.parameters())
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    assert all(weight.grad is None for weight in weights)
    with projector_in_every_batch(model):
        loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, plain)
    loss.backward()
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in weights)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)  # the hook is gone
