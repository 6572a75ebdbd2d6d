"""A small ViT of any shape, and its forward pass written as loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from radio.students.vit import ViT, ViTConfig, global_blocks
from radio.types import Features


@pytest.fixture
def small_vit() -> Callable[..., ViT]:
    """A function that builds a ViT of width 32, depth 8 and patch 4, or as told otherwise."""

    def make(**changes: Any) -> ViT:
        shape = {"width": 32, "depth": 8, "heads": 2, "patch": 4, "native": 32, "positions": 10}
        torch.manual_seed(7)
        vit = ViT(ViTConfig(**{"name": "vit-small", **shape, **changes})).eval()
        with (
            torch.no_grad()
        ):  # at the usual start blocks hardly change their input, and tests would see little
            for block in vit.blocks:
                for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                    linear.weight.normal_(std=linear.in_features**-0.5)
            vit.prefix.normal_()
        return vit

    return make


@pytest.fixture
def forward_by_loop() -> Callable[..., Features]:
    """A function that runs a ViT image by image, and its windowed blocks window by window."""

    def run(vit: ViT, images: Tensor, crops: Tensor | None = None) -> Features:
        config = vit.config
        grid = images.shape[-2] // config.patch, images.shape[-1] // config.patch
        everywhere = range(config.depth)
        if config.window is not None:
            everywhere = global_blocks(config.depth, config.schedule)
        prefixes, planes = [], []
        for i, image in enumerate(images):
            positions = vit.positions(grid, None if crops is None else crops[i : i + 1])
            tokens = vit.stem(vit.normalise(image[None])) + positions
            plane, prefix = tokens[0].unflatten(0, grid), vit.prefix[0]
            for index, block in enumerate(vit.blocks):
                if index in everywhere:
                    joined = block(torch.cat((prefix, plane.flatten(0, 1)))[None])[0]
                    prefix, plane = joined[: len(prefix)], joined[len(prefix) :].unflatten(0, grid)
                else:
                    plane = _windows(block, plane, config.window)
            prefixes.append(vit.norm(prefix))
            planes.append(vit.norm(plane).flatten(0, 1))
        tokens = torch.stack(planes)
        if config.class_tokens == 0:
            return Features(torch.stack([t.mean(0) for t in tokens]), tokens, grid)
        summaries = [torch.cat(list(p[: config.class_tokens])) for p in prefixes]
        return Features(torch.stack(summaries), tokens, grid)

    def _windows(block: torch.nn.Module, plane: Tensor, side: int) -> Tensor:
        out = torch.empty_like(plane)
        for top in range(0, plane.shape[0], side):
            for left in range(0, plane.shape[1], side):
                window = plane[top : top + side, left : left + side]
                mixed = block(window.flatten(0, 1)[None])[0]
                out[top : top + side, left : left + side] = mixed.unflatten(0, window.shape[:2])
        return out

    return run
