"""Operations by hand and by torch's own counter, bytes by hand: all of tensors without values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from radio.students import StudentOptions
from train.config import CacheConfig, TeacherConfig, TrainConfig
from train.cost import Cost, CostCounter, bytes_of, count, outline
from train.partition import make_partition

CLIP = TeacherConfig(name="clip", model="tiny:clip")


def cost_of(config: TrainConfig, *, half: bool = False, standing: bool = False) -> Cost:
    group = make_partition(config, 1).groups[0]
    return count(config, outline(config), group, half=half, standing=standing)


def test_bytes_that_are_held() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    with CostCounter() as tally:
        doubled = weight * 2
        view = doubled.view(10, 100)[1:]
        assert tally.now == 4000  # a view is no storage of its own
        whole = (view + 1).sum()
        assert (tally.now, tally.peak) == (4004, 4000 + 3600 + 4)
        del doubled
        assert tally.now == 4004  # the view still holds it
        del view
        assert tally.now == 4
        assert float(whole.detach()) == 900
    with CostCounter() as tally:
        (weight.exp() * 3).sum().backward()
        assert tally.now == 4000  # the gradient
        weight.grad = None
        assert tally.now == 0


def test_recomputed_graphs_are_let_go() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4))
    x = torch.zeros(100, 64, requires_grad=True)
    with CostCounter() as tally:
        y = x
        for layer in layers:
            y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
        y.sum().backward()
        del y
        x.grad = None
        layers.zero_grad(set_to_none=True)
        assert tally.now == 0


def test_operations_are_those_of_torchs_counter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 16), nn.GELU())
    x = torch.randn(2, 3, 16, 16)
    with CostCounter() as ours:
        model(x).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        model(x).sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_attention_by_the_fused_kernel() -> None:
    q = torch.zeros(2, 4, 10, 16, requires_grad=True)
    with CostCounter() as tally:
        out = F.scaled_dot_product_attention(q, q, q).sum()
        assert tally.flops == 2 * (2 * 2 * 4 * 10 * 10 * 16)  # q k and its product with v
        out.backward()
        assert tally.flops == (2 + 5) * (2 * 2 * 4 * 10 * 10 * 16)  # the backward makes q k anew


def test_the_operations_of_a_step_by_hand(config: TrainConfig) -> None:
    chosen = replace(config, student="vit-b16", resolution=64, teachers=(CLIP,), batch_size=3)
    d, t, teacher = 768, 16 + 1, 25
    block = 2 * t * (3 * d * d + d * d + 2 * 4 * d * d) + 2 * 2 * t * t * d
    stem = 2 * 16 * d * 3 * 16 * 16
    heads = 2 * (d * d + 12 * d) + 2 * teacher * (d * d + 24 * d)  # the spatial one on the teacher's grid
    found = cost_of(chosen)
    assert found.forward_flops == 3 * (12 * block + stem + heads)
    assert found.teacher_flops == 3 * 2 * (25 * 24 * 3 * 10 * 10 + 24 * 12)
    # Twice the forward, but no gradient of the images, and attention's q k once more.
    assert found.backward_flops == 3 * (12 * (2 * block + 2 * t * t * d) + stem + 2 * heads)
    assert found.flops == found.teacher_flops + found.forward_flops + found.backward_flops
    # Images of 64 px for both, and the features of a 5 x 5 grid.
    assert found.inputs == 3 * 4 * (3 * 64 * 64 + 25 * 24 + 12)


def test_memory_grows_with_the_images_and_gradients_with_the_weights(config: TrainConfig) -> None:
    few, many = (
        cost_of(replace(config, teachers=(CLIP,), batch_size=size), standing=True) for size in (8, 16)
    )
    assert many.activations == pytest.approx(2 * few.activations, rel=0.02)
    assert many.peak >= many.activations
    weights = bytes_of(outline(replace(config, teachers=(CLIP,))).model)
    small = replace(config, teachers=(CLIP,), batch_size=1)
    alone, standing = cost_of(small), cost_of(small, standing=True)
    assert alone.activations == standing.activations
    assert weights < alone.peak < weights + standing.peak


def test_what_makes_it_cheaper(config: TrainConfig) -> None:
    config = replace(config, teachers=(CLIP,), batch_size=16)
    plain = cost_of(config)
    parts = cost_of(replace(config, grad_accum_steps=4))
    assert (parts.flops, parts.inputs) == (plain.flops, plain.inputs)
    assert parts.activations == pytest.approx(plain.activations / 4, rel=0.05)
    saving = cost_of(replace(config, options=StudentOptions(activation_checkpointing=True)))
    assert saving.activations < 0.8 * plain.activations
    assert saving.backward_flops > 1.2 * plain.backward_flops
    half = cost_of(config, half=True)
    assert half.flops == plain.flops
    assert 0.5 * plain.activations < half.activations < 0.8 * plain.activations
    cached = cost_of(replace(config, cache=CacheConfig(folder=config.out)))
    assert (cached.teacher_flops, cached.teacher_working) == (0, 0)
    assert cached.forward_flops == plain.forward_flops


@pytest.mark.parametrize("kind", ["uncertainty", "adaloss"])
def test_balancers_can_be_counted(config: TrainConfig, kind: str) -> None:
    balanced = replace(config, balance=replace(config.balance, kind=kind))
    assert cost_of(balanced).forward_flops >= cost_of(config).forward_flops
