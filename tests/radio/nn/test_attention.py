"""Self-attention, and the block around it, against loops over heads and formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.nn.vit import MLP, Attention, Block, LayerScale
from radio.ops import from_windows, to_windows


def _attention_by_loop(layer: Attention, x: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, D], one image, head and query at a time."""
    images = []
    for image in x:
        qkv = F.linear(image, layer.qkv.weight, layer.qkv.bias)
        q, k, v = qkv.split(x.shape[-1], dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(layer.heads, dim=-1) for part in (q, k, v)), strict=True):
            rows = [((k_h @ query) / math.sqrt(query.shape[0])).softmax(dim=0) @ v_h for query in q_h]
            heads.append(torch.stack(rows))
        images.append(F.linear(torch.cat(heads, dim=-1), layer.proj.weight, layer.proj.bias))
    return torch.stack(images)


@pytest.mark.parametrize(("tokens", "width", "heads"), [(7, 12, 3), (16, 8, 1), (1, 8, 8)])
def test_attention_equals_a_loop_over_heads_and_queries(tokens, width, heads):
    torch.manual_seed(0)
    layer = Attention(width, heads)
    x = torch.randn(2, tokens, width)
    torch.testing.assert_close(layer(x), _attention_by_loop(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("grid", "side"), [((72, 72), 8), ((72, 72), 9), ((72, 72), 18), ((36, 72), 12)])
def test_windows_folded_into_the_batch_equal_a_loop_over_windows(grid, side):
    torch.manual_seed(0)
    layer = Attention(16, 2).eval()
    x = torch.randn(1, grid[0] * grid[1], 16)
    plane, wanted = x.unflatten(1, grid), torch.empty(1, *grid, 16)
    with torch.inference_mode():
        for top in range(0, grid[0], side):
            for left in range(0, grid[1], side):
                cut = (slice(None), slice(top, top + side), slice(left, left + side))
                wanted[cut] = layer(plane[cut].flatten(1, 2)).unflatten(1, (side, side))
        folded = layer(to_windows(x, grid, side).reshape(-1, side * side, 16)).reshape(x.shape)
    torch.testing.assert_close(from_windows(folded, grid, side), wanted.flatten(1, 2), rtol=0, atol=1e-5)


def test_the_block_is_its_formula():
    torch.manual_seed(0)
    block = Block(8, 2, 32, layer_scale=0.5)
    x = torch.randn(2, 5, 8)
    y = x + 0.5 * block.attn(F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
    hidden = F.linear(
        F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6),
        block.mlp.fc1.weight,
        block.mlp.fc1.bias,
    )
    exact_gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    wanted = y + 0.5 * F.linear(exact_gelu, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-6)


def test_layer_scale_starts_where_told_and_is_left_out_on_request():
    assert torch.equal(LayerScale(3, 0.1)(torch.ones(2, 3)), torch.full((2, 3), 0.1))
    assert not any("gamma" in name for name, _ in Block(8, 2, 16).named_parameters())


def test_the_mlp_can_change_the_width():
    assert MLP(4, 8, 3)(torch.zeros(2, 5, 4)).shape == (2, 5, 3)
    assert MLP(4, 8)(torch.zeros(2, 5, 4)).shape == (2, 5, 4)
