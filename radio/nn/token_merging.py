"""Token merging: the most alike of an image's output tokens become one, until a number of them is left.

Bipartite soft matching (D. Bolya et al., ToMe, arXiv 2210.09461) once, on the output features, as RADIOv2.5
does it for language models. What it leaves open is ours: similarity is the cosine, and destinations stand on
the finest regular stride of the grid that leaves no more of them than are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SizeError

# Letters: B batch, T tokens, D width, H W grid, K kept tokens, S sources, M merged sources.


def merge_tokens(tokens: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """Average the tokens that are most alike: [B, T, D] -> [B, K, D], or all of them where T <= K.

    Every region of the image keeps a token: those on a regular stride are destinations, and the T - K others
    that are most similar to a destination are averaged into it. What is kept stays in the grid's order.

    Args:
        tokens: row-major over the grid.
        grid: (H, W), H * W == T.
        keep: K.

    Raises:
        SizeError: a grid that is not that of the tokens, or fewer than one token to keep.
    """
    count = tokens.shape[1]
    if grid[0] * grid[1] != count or keep < 1:
        raise SizeError(
            f"{count} tokens of a {grid[0]}x{grid[1]} grid cannot become {keep}; give the tokens' own grid, "
            f"and keep one or more"
        )
    if count <= keep:
        return tokens
    is_target = _destinations(grid, keep).to(tokens.device)
    targets, sources = is_target.nonzero()[:, 0], (~is_target).nonzero()[:, 0]
    unit = F.normalize(tokens.float(), dim=-1)
    similarity, nearest = (unit[:, sources] @ unit[:, targets].mT).max(dim=-1)  # [B, S]
    # Stable, so that of equal similarities the first source is merged.
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    merged = order[:, : count - keep]  # [B, M]
    places = targets[nearest.gather(1, merged)]
    sums = tokens.float().clone()
    index = places[..., None].expand(-1, -1, tokens.shape[-1])
    gone = sources[merged]
    sums.scatter_add_(1, index, tokens.float().gather(1, gone[..., None].expand_as(index)))
    counts = torch.ones(tokens.shape[:2], device=tokens.device).scatter_add_(
        1, places, torch.ones_like(places, dtype=torch.float32)
    )
    left = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter_(1, gone, value=False)
    means = sums / counts[..., None]
    return means[left].reshape(len(tokens), keep, -1).to(tokens.dtype)


def _destinations(grid: tuple[int, int], keep: int) -> Tensor:
    """Mark the tokens on the finest regular stride that has at most `keep` of them: [T] bool."""
    height, width = grid
    stride = 2
    while -(-height // stride) * -(-width // stride) > keep:
        stride += 1
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[::stride, ::stride] = True
    return mask.flatten()
