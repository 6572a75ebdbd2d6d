"""Token merging against a slow loop, and what has to hold for any tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import SizeError
from radio.nn.token_merging import merge_tokens


def merged_by_loop(tokens: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """One image at a time, one source at a time: [T, D] -> [K, D]."""
    stride = 2
    while -(-grid[0] // stride) * -(-grid[1] // stride) > keep:
        stride += 1
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    targets = [i for i, (y, x) in enumerate(places) if y % stride == 0 and x % stride == 0]
    best = {}
    for i in range(len(places)):
        if i not in targets:
            likeness = [float(F.cosine_similarity(tokens[i], tokens[t], dim=0)) for t in targets]
            best[i] = (max(likeness), targets[likeness.index(max(likeness))])
    gone = sorted(best, key=lambda i: -best[i][0])[: len(places) - keep]
    groups = {i: [tokens[i]] for i in range(len(places)) if i not in gone}
    for i in gone:
        groups[best[i][1]].append(tokens[i])
    return torch.stack([torch.stack(groups[i]).mean(dim=0) for i in sorted(groups)])


@pytest.mark.parametrize(
    ("grid", "keep"), [((6, 6), 20), ((6, 6), 9), ((5, 7), 12), ((6, 6), 4), ((4, 4), 1), ((1, 9), 6)]
)
def test_it_is_the_loop(grid: tuple[int, int], keep: int) -> None:
    tokens = torch.randn(3, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    found = merge_tokens(tokens, grid, keep)
    assert found.shape == (3, keep, 8)
    torch.testing.assert_close(found, torch.stack([merged_by_loop(image, grid, keep) for image in tokens]))


def test_equal_tokens_lose_nothing() -> None:
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[torch.tensor([0, 0, 1, 1] * 4)][None]  # a 4 x 4 grid
    found = merge_tokens(tokens, (4, 4), 4)
    assert torch.equal(found, torch.tensor([[[1.0, 0.0], [0.0, 1.0]] * 2]))


def test_few_tokens_stay_and_half_precision_comes_back() -> None:
    tokens = torch.randn(1, 16, 4).bfloat16()
    assert merge_tokens(tokens, (4, 4), 16) is tokens
    found = merge_tokens(tokens, (4, 4), 10)
    assert found.dtype == torch.bfloat16
    exact = merge_tokens(tokens.float(), (4, 4), 10)
    torch.testing.assert_close(found.float(), exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(("grid", "keep"), [((3, 4), 4), ((4, 4), 0)])
def test_what_cannot_be_is_one_error(grid: tuple[int, int], keep: int) -> None:
    with pytest.raises(SizeError, match=rf"16 tokens of a {grid[0]}x{grid[1]} grid cannot become {keep}"):
        merge_tokens(torch.zeros(1, 16, 2), grid, keep)
