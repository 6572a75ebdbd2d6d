"""segment-anything's attention with the indices of its positions on the device of the weights."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

# Letters: B windows or images, H W grid, D width, h heads, C width of a head, Q query and K key coordinates.


@final
class SamAttention(nn.Module):
    """segment-anything's `Attention` with the same weight names and bit-identical results.

    The library makes the indices of its relative positions on the CPU in every forward: on a GPU two blocking
    copies per block. Here they are non-persistent buffers, which move with the weights.

    Args:
        attention: the library's module, whose weights are reused.
    """

    rows: Tensor  # [Q, K]
    columns: Tensor  # [Q, K]

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv: nn.Linear = attention.qkv
        self.proj: nn.Linear = attention.proj
        self.rel_pos_h: nn.Parameter = attention.rel_pos_h
        self.rel_pos_w: nn.Parameter = attention.rel_pos_w
        for name, table in (("rows", self.rel_pos_h), ("columns", self.rel_pos_w)):
            line = torch.arange((len(table) + 1) // 2, device=table.device)
            self.register_buffer(name, line[:, None] - line[None, :] + len(line) - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to [B, H, W, D]; H and W are those that the tables were made for."""
        b, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(b, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * self.num_heads, height * width, -1).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        query = q.reshape(b * self.num_heads, height, width, -1)
        by_row = torch.einsum("bhwc,hkc->bhwk", query, self.rel_pos_h[self.rows])
        by_column = torch.einsum("bhwc,wkc->bhwk", query, self.rel_pos_w[self.columns])
        scores = scores.view(-1, height, width, height, width) + by_row[..., None] + by_column[:, :, :, None]
        weights = scores.view(-1, height * width, height * width).softmax(dim=-1)
        mixed = (weights @ v).view(b, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        out: Tensor = self.proj(mixed.reshape(b, height, width, -1))
        return out


def with_own_indices(encoder: Any) -> Any:
    """Replace the attention of every block of an `ImageEncoderViT` that has relative positions, in place."""
    for block in encoder.blocks:
        if not isinstance(block.attn, SamAttention) and block.attn.use_rel_pos:
            block.attn = SamAttention(block.attn)
    return encoder
