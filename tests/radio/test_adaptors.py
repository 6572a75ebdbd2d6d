"""Adaptors: widths, class token slots, and where the tokens are resampled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import ConfigError
from radio.model import AdaptorConfig, Head, MLPAdaptor
from radio.types import Features


def _features(summary_dim: int = 8, token_dim: int = 8) -> Features:
    generator = torch.Generator().manual_seed(0)
    summary = torch.randn(2, summary_dim, generator=generator)
    return Features(summary, torch.randn(2, 12, token_dim, generator=generator), (3, 4))


def _head_by_hand(head: Head, x: Tensor) -> Tensor:
    first, norm, _, last = head.layers
    hidden = x @ first.weight.T + first.bias
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    return F.gelu(normed) @ last.weight.T + last.bias


@pytest.mark.parametrize("grid", [(6, 6), (2, 2), (5, 3), (3, 4), None])
@pytest.mark.parametrize("resample", ["before", "after"])
def test_tokens_are_resampled_before_or_after_the_head(bilinear_by_loop, resample, grid):
    torch.manual_seed(0)
    adaptor = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7, resample=resample), 8, 8)
    features = _features()
    to = grid or features.grid

    def resized(tokens: Tensor) -> Tensor:
        return torch.stack([bilinear_by_loop(one.unflatten(0, (3, 4)), to).flatten(0, 1) for one in tokens])

    found = adaptor(features, grid)
    with torch.no_grad():
        if resample == "before":
            wanted = _head_by_hand(adaptor.spatial, resized(features.tokens))
        else:
            wanted = resized(_head_by_hand(adaptor.spatial, features.tokens))
        torch.testing.assert_close(found.tokens, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.summary, _head_by_hand(adaptor.summary, features.summary))
    assert found.grid == to and found.summary.shape == (2, 5) and found.tokens.shape == (2, to[0] * to[1], 7)


def test_before_and_after_differ_since_the_head_is_not_linear():
    torch.manual_seed(0)
    before = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7), 8, 8)
    after = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7, resample="after"), 8, 8)
    after.load_state_dict(before.state_dict())
    features = _features()
    assert torch.equal(before(features).tokens, after(features).tokens)
    assert not torch.allclose(before(features, (6, 5)).tokens, after(features, (6, 5)).tokens, atol=1e-3)


def test_a_slot_reads_its_own_class_token():
    features = _features(summary_dim=24)
    for slot in range(3):
        torch.manual_seed(slot)
        adaptor = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7, slot=slot), 24, 8)
        own = features.summary[:, 8 * slot : 8 * slot + 8]
        torch.testing.assert_close(adaptor(features).summary, _head_by_hand(adaptor.summary, own))
    whole = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7), 24, 8)
    torch.testing.assert_close(whole(features).summary, _head_by_hand(whole.summary, features.summary))


@pytest.mark.parametrize("slot", [3, -1])
def test_a_slot_without_a_class_token_is_an_error(slot):
    with pytest.raises(ConfigError, match=f"adaptor 'clip' reads class token {slot}, and the student has 3"):
        MLPAdaptor(AdaptorConfig(name="clip", summary_dim=5, token_dim=7, slot=slot), 24, 8)


def test_the_hidden_width_is_the_students_or_as_told():
    narrow = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7, hidden=3), 24, 8)
    usual = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7), 24, 8)
    for adaptor, hidden in ((narrow, 3), (usual, 8)):
        count = (24 * hidden + hidden) + 2 * hidden + (hidden * 5 + 5)  # summary
        count += (8 * hidden + hidden) + 2 * hidden + (hidden * 7 + 7)  # tokens
        assert sum(p.numel() for p in adaptor.parameters()) == count


@pytest.mark.parametrize("resample", ["before", "after"])
def test_gradients_reach_both_heads_and_the_student(resample):
    adaptor = MLPAdaptor(AdaptorConfig(name="t", summary_dim=5, token_dim=7, resample=resample), 8, 8)
    features = Features(*(part.requires_grad_() for part in _features()[:2]), (3, 4))
    found = adaptor(features, (5, 5))
    (found.summary.square().sum() + found.tokens.square().sum()).backward()
    for tensor in (*adaptor.parameters(), features.summary, features.tokens):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
