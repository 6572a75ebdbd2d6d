"""Windowed attention with position biases, against loops over windows, heads and tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio.errors import SizeError
from radio.nn.hybrid import (
    MultiResolutionBlock,
    PositionBias,
    WindowBlock,
    map_of,
    windows_of,
)


def _maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def lively():
    """A function that draws matrices of about unit gain, so that attention and its bias are far from flat."""

    def draw(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                gain = 4.0 if "positions" in name else 1.0
                scale = gain * parameter[0].numel() ** -0.5
                parameter.data.normal_(0, scale, generator=generator)
        return module.eval()

    return draw


def _bias_by_loop(positions: PositionBias, side: int) -> Tensor:
    where = [(row, column) for row in range(side) for column in range(side)]
    out = torch.zeros(positions.fc2.out_features, side * side, side * side)
    for i, asks in enumerate(where):
        for j, asked in enumerate(where):
            apart = [one - other for one, other in zip(asks, asked, strict=True)]
            spaced = [math.copysign(math.log2(1 + abs(a)) / 3, a) for a in apart]
            hidden = (positions.fc1.weight @ torch.tensor(spaced) + positions.fc1.bias).clamp(min=0)
            out[:, i, j] = positions.fc2.weight @ hidden
    return out


def _block_by_loop(block: WindowBlock, plane: Tensor, side: int) -> Tensor:
    """One map [H, W, D], window by window and head by head."""
    bias = _bias_by_loop(block.positions, side)
    out = torch.empty_like(plane)
    heads, width = block.attn.heads, plane.shape[-1] // block.attn.heads
    for top in range(0, plane.shape[0], side):
        for left in range(0, plane.shape[1], side):
            x = plane[top : top + side, left : left + side].reshape(side * side, -1)
            q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T).chunk(3, dim=-1)
            mixed = []
            for h in range(heads):
                mine = slice(h * width, (h + 1) * width)
                logits = q[:, mine] @ k[:, mine].T / math.sqrt(width) + bias[h]
                mixed.append(logits.softmax(dim=-1) @ v[:, mine])
            x = x + torch.cat(mixed, dim=-1) @ block.attn.proj.weight.T
            x = x + F.gelu(block.norm2(x) @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
            out[top : top + side, left : left + side] = x.unflatten(0, (side, side))
    return out


@pytest.mark.parametrize("side", [1, 2, 5])
@torch.inference_mode()
def test_the_position_bias_of_every_pair_of_tokens(lively, side):
    positions = lively(PositionBias(3))
    found = positions(side)
    assert found.shape == (1, 3, side * side, side * side)
    torch.testing.assert_close(found[0], _bias_by_loop(positions, side), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_smaller_windows_biases_are_those_of_a_larger_one(lively):
    positions = lively(PositionBias(2))
    small, large = positions(3), positions(5)
    inside = torch.tensor([row * 5 + column for row in range(3) for column in range(3)])
    torch.testing.assert_close(small, large[:, :, inside][..., inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "side"), [((4, 8), 4), ((6, 3), 3), ((5, 5), 5)])
@torch.inference_mode()
def test_a_block_equals_a_loop_over_windows_and_heads(lively, grid, side):
    block = lively(MultiResolutionBlock(8, 2, 1))
    x = _maps(2, 8, *grid)
    wanted = torch.stack([_block_by_loop(block.block, plane.permute(1, 2, 0), side) for plane in x])
    torch.testing.assert_close(block(x, side), wanted.permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert (block(x, side) - x).abs().max() > 0.5


@pytest.mark.parametrize("mix", [1.0, 0.5])
@torch.inference_mode()
def test_ratio_2_works_at_half_the_resolution(lively, mix):
    block = lively(MultiResolutionBlock(8, 2, 2, mix))
    x = _maps(2, 8, 8, 16)
    low = F.conv2d(x, block.down.weight, block.down.bias, stride=2)
    inner = torch.stack([_block_by_loop(block.block, plane.permute(1, 2, 0), 4) for plane in low])
    up = F.conv_transpose2d(inner.permute(0, 3, 1, 2), block.up.weight, block.up.bias, stride=2)
    torch.testing.assert_close(block(x, 4), mix * x + mix * up, rtol=0, atol=1e-5)


def test_the_bias_is_computed_once_a_forward_whatever_the_batch(monkeypatch):
    block, asked = MultiResolutionBlock(8, 2, 1), []
    forward = PositionBias.forward
    monkeypatch.setattr(PositionBias, "forward", lambda self, side: asked.append(side) or forward(self, side))
    block(_maps(3, 8, 8, 12), 4)
    assert asked == [4]


def test_windows_of_a_map_and_back():
    x = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    windows = windows_of(x, 2)
    assert windows.shape == (12, 4, 3)
    assert torch.equal(windows[7].T.view(3, 2, 2), x[1, :, 0:2, 2:4])
    back = map_of(windows, (4, 6), 2)
    assert torch.equal(back, x) and back.is_contiguous(memory_format=torch.channels_last)
    one = x[:, :, :, :4]
    one = one.contiguous(memory_format=torch.channels_last)
    assert map_of(windows_of(one, 4), (4, 4), 4).data_ptr() == one.data_ptr()  # one window: no copy
    with pytest.raises(SizeError, match="a 4x6 grid does not divide into 4x4 windows"):
        windows_of(x, 4)


def test_the_bias_is_made_once_outside_of_training_and_anew_when_anything_changes(lively, monkeypatch):
    positions = lively(PositionBias(2))
    made = []
    make = PositionBias._make
    monkeypatch.setattr(PositionBias, "_make", lambda self, side: made.append(side) or make(self, side))
    with torch.no_grad():
        first = positions(3)
        assert positions(3) is first and made == [3]
        assert positions(2).shape[-1] == 4 and made == [3, 2]
        positions.fc2.weight.mul_(2)  # as an optimizer does
        assert torch.equal(positions(2), make(positions, 2))
        assert made == [3, 2, 2]
        positions.load_state_dict({name: 0 * value for name, value in positions.state_dict().items()})
        assert not positions(2).any() and made == [3, 2, 2, 2]
        positions.fc2.weight.data.fill_(1)  # unseen, until the mode is set
        positions.fc1.bias.data.fill_(1)
        assert positions.eval()(2).all()
        assert positions.double()(2).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert positions.float()(2).dtype == torch.bfloat16
        assert positions(2).dtype == torch.float32
        assert copy.deepcopy(positions)._kept is None


def test_without_values_it_is_made_in_every_forward():
    with torch.device("meta"), torch.no_grad():
        positions = PositionBias(2).eval()
        assert positions(3).is_meta and positions._kept is None


def test_a_bias_that_is_learned_or_traced_is_never_a_kept_one(lively):
    positions = lively(PositionBias(2))
    with torch.inference_mode():
        wanted = positions(3).clone()
    positions(3).square().sum().backward()  # in evaluation mode, with gradients
    assert positions.fc1.weight.grad.abs().sum() > 0
    exported = torch.export.export(Sided(positions), (torch.zeros(1),)).module()
    with torch.no_grad():
        positions.fc2.weight.mul_(3)
        torch.testing.assert_close(exported(torch.zeros(1)), wanted)


class Sided(nn.Module):
    """The biases of windows of 3, added to a number."""

    def __init__(self, positions: PositionBias) -> None:
        super().__init__()
        self.positions = copy.deepcopy(positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(3) + x
