"""The average against a sum by hand."""

from __future__ import annotations

import torch
from torch import nn

from train.optim import Average


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    model = nn.Linear(2, 1)
    average = Average(model, 0.75)
    history = [model.weight.detach().clone()]
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        history.append(model.weight.detach().clone())
        average.update(torch.tensor(True))
        with torch.no_grad():
            kept = model.weight.clone()
            model.weight.add_(100.0)
            average.update(torch.tensor(False))  # a step that was left out
            model.weight.copy_(kept)
    shares = (0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25)
    wanted = torch.stack([share * value for share, value in zip(shares, history, strict=True)]).sum(0)
    assert torch.allclose(average.tensors["weight"], wanted, atol=1e-6)
    assert torch.equal(model.weight, history[-1])
    assert torch.equal(average.tensors["bias"], model.bias)
    assert list(average.tensors) == ["weight", "bias"]
