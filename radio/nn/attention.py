"""Multi-head self-attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Letters: B batch, T tokens, D width, h heads.


class Attention(nn.Module):
    """Self-attention over all tokens of a sequence, through PyTorch's fused kernel.

    Args:
        width: D, the token width.
        heads: attention heads; they divide the width.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Apply self-attention to [B, T, D]; `positions` [1, h, T, T] is added to the logits."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        added = None if positions is None else positions.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return out
