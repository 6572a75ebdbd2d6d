"""Every layout's keys become the official ones, and each keeps its own rule for positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radio.errors import CheckpointError
from radio.teachers.dinov2 import Resampling, to_official

OFFICIAL = Resampling(offset=0.1)
ANTIALIASED = Resampling(antialias=True)


def official(**more: Tensor) -> dict[str, Tensor]:
    names = {"cls_token": (1, 1, 4), "pos_embed": (1, 5, 4), "mask_token": (1, 4), "blocks.0.ls1.gamma": (4,)}
    return {name: torch.rand(shape) for name, shape in names.items()} | more


def test_the_official_layout_keeps_its_names_but_for_the_mask_token():
    tensors = official()
    layout = to_official(tensors, "file")
    assert set(layout.tensors) == {"cls_token", "pos_embed", "blocks.0.ls1.gamma"}
    assert layout.resampling == OFFICIAL


def test_official_models_with_registers_antialias_without_offset():
    assert to_official(official(register_tokens=torch.rand(1, 4, 4)), "file").resampling == ANTIALIASED


def test_timms_registers_and_positions():
    tensors = official(reg_token=torch.rand(1, 4, 4), pos_embed=torch.rand(1, 4, 4))
    del tensors["mask_token"]
    layout = to_official(tensors, "file")
    assert layout.resampling == ANTIALIASED
    assert torch.equal(layout.tensors["register_tokens"], tensors["reg_token"])
    assert torch.equal(layout.tensors["pos_embed"][:, 1:], tensors["pos_embed"])
    assert not layout.tensors["pos_embed"][:, 0].any()  # timm has added it to the class token


@pytest.mark.parametrize(("packed", "names"), [(2, ("w12", "w3")), (1, ("fc1", "fc2"))])
def test_timms_packed_swiglu_is_known_by_its_shape(packed, names):
    first, second = torch.rand(packed * 8, 4), torch.rand(4, 8)
    tensors = official(**{"blocks.0.mlp.fc1.weight": first, "blocks.0.mlp.fc2.weight": second})
    del tensors["mask_token"]
    found = to_official(tensors, "file").tensors
    assert torch.equal(found[f"blocks.0.mlp.{names[0]}.weight"], first)
    assert torch.equal(found[f"blocks.0.mlp.{names[1]}.weight"], second)


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_transformers_names_and_joined_projections(prefix):
    theirs = {
        "embeddings.cls_token": (1, 1, 4),
        "embeddings.mask_token": (1, 4),
        "embeddings.position_embeddings": (1, 5, 4),
        "embeddings.patch_embeddings.projection.bias": (4,),
        "encoder.layer.3.attention.attention.query.weight": (4, 4),
        "encoder.layer.3.attention.attention.key.weight": (4, 4),
        "encoder.layer.3.attention.attention.value.weight": (4, 4),
        "encoder.layer.3.attention.output.dense.bias": (4,),
        "encoder.layer.3.layer_scale2.lambda1": (4,),
        "encoder.layer.3.mlp.weights_in.bias": (6,),
        "layernorm.weight": (4,),
    }
    tensors = {prefix + name: torch.rand(shape) for name, shape in theirs.items()}
    layout = to_official(tensors, "file")
    assert layout.resampling == Resampling()
    assert set(layout.tensors) == {
        *("cls_token", "pos_embed", "patch_embed.proj.bias", "norm.weight"),
        *(
            "blocks.3.attn.qkv.weight",
            "blocks.3.attn.proj.bias",
            "blocks.3.ls2.gamma",
            "blocks.3.mlp.w12.bias",
        ),
    }
    parts = [
        tensors[f"{prefix}encoder.layer.3.attention.attention.{part}.weight"]
        for part in ("query", "key", "value")
    ]
    assert torch.equal(layout.tensors["blocks.3.attn.qkv.weight"], torch.cat(parts))


def test_other_weights_are_refused_by_what_they_hold():
    with pytest.raises(CheckpointError, match=r"resnet\.pth: not DINOv2 weights: .*got conv1\.weight"):
        to_official({"conv1.weight": torch.rand(1)}, "resnet.pth")
