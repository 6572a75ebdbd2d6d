"""DINOv2's architecture against timm's and transformers', from files in their layouts."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from radio.checkpoint import load_tensors
from radio.errors import CheckpointError, ConfigError
from radio.teachers import families
from radio.teachers.base import Frozen
from radio.teachers.dinov2 import (
    MEMBERS,
    TABLE,
    DinoArchitecture,
    DinoTrunk,
    Resampling,
    load_dinov2,
    to_official,
)

TIMM = {"vits14": "vit_small_patch14_dinov2", "vitb14": "vit_base_patch14_dinov2"}
TIMM |= {"vitl14": "vit_large_patch14_dinov2", "vitg14": "vit_giant_patch14_dinov2"}
TIMM |= {f"{ours}_reg": theirs.replace("14_", "14_reg4_") for ours, theirs in TIMM.items()}
SMALL = DinoArchitecture(width=192, depth=2, swiglu=True)


def timm_model(name: str) -> VisionTransformer:
    with torch.device("meta"):
        return timm.create_model(TIMM[name], pretrained=False, dynamic_img_size=True)


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def check_against_timm(model: VisionTransformer, teacher, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.forward_features(normalise(images))
    features = teacher(images)
    assert features.grid == (size[0] // 14, size[1] // 14)
    torch.testing.assert_close(features.summary, theirs[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.tokens, theirs[:, model.num_prefix_tokens :], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vits14", (70, 98)),
        ("vits14_reg", (70, 98)),
        pytest.param("vitb14", (224, 224), marks=pytest.mark.slow),
        pytest.param("vitb14_reg", (224, 224), marks=pytest.mark.slow),
    ],
)
def test_timms_file_gives_timms_features(name, size, randomised, tmp_path):
    model = randomised(timm_model(name))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    teacher = families["dinov2"](name, tmp_path / "w.pth")
    assert teacher.name == f"dinov2:{name}" and teacher.native_size == (224, 224)
    check_against_timm(model, teacher, size)


@pytest.mark.slow
def test_an_official_file_gives_timms_features_at_the_tables_size(randomised, tmp_path):
    model = randomised(timm_model("vits14"))
    official = {**model.state_dict(), "mask_token": torch.zeros(1, 384)}
    torch.save(official, tmp_path / "w.pth")
    check_against_timm(model, families["dinov2"]("vits14", tmp_path / "w.pth"), (518, 518))


def small_timm(registers: int, randomised) -> tuple[VisionTransformer, Frozen]:
    """timm's network of the giant's kind in small, and ours with its weights."""
    model = VisionTransformer(
        img_size=518,
        patch_size=14,
        embed_dim=192,
        depth=2,
        num_heads=3,
        num_classes=0,
        init_values=1e-5,
        mlp_ratio=2.66667 * 2,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        reg_tokens=registers,
        no_embed_class=bool(registers),
        dynamic_img_size=True,
    )
    member = DinoArchitecture(width=192, depth=2, swiglu=True, num_registers=registers)
    model = randomised(model)
    return model, load_dinov2("small", member, dict(model.state_dict()), "file")


@pytest.mark.parametrize("registers", [0, 4])
def test_the_giants_swiglu_is_timms(registers, randomised):
    check_against_timm(*small_timm(registers, randomised), (56, 84))


@pytest.mark.parametrize("registers", [0, 4])
def test_features_after_a_block_are_timms(registers, randomised):
    model, teacher = small_timm(registers, randomised)
    assert teacher.num_blocks == 2 and teacher.intermediate is not None
    images = torch.rand(2, 3, 56, 84)
    with torch.no_grad():
        theirs = model.forward_intermediates(
            normalise(images), return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
    for block, features in zip([1, 0], teacher.intermediate(images, [1, 0]), strict=True):
        tokens, prefix = theirs[block]
        torch.testing.assert_close(features.summary, prefix[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.tokens, tokens, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="block 2 is not one of the 2 of small; count from 0"):
        teacher.intermediate(images, [2])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_file_gives_transformers_features(registers, swiglu, randomised, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=swiglu,
        **settings,
    )
    model = randomised(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    member = DinoArchitecture(width=192, depth=2, swiglu=swiglu, num_registers=registers)
    teacher = load_dinov2("small", member, load_tensors(tmp_path / "model.safetensors"), "file")
    images = torch.rand(2, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(normalise(images)).last_hidden_state
    features = teacher(images)
    torch.testing.assert_close(features.summary, theirs[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(features.tokens, theirs[:, 1 + registers :], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(MEMBERS))
def test_names_and_shapes_are_timms(name):
    theirs = to_official(dict(timm_model(name).state_dict()), "timm").tensors
    with torch.device("meta"):
        ours = DinoTrunk(MEMBERS[name], Resampling()).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def test_the_giant_has_the_official_files_names_and_size():
    with torch.device("meta"):
        state = DinoTrunk(MEMBERS["vitg14"], Resampling()).state_dict()
    assert state["blocks.39.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.39.mlp.w3.weight"].shape == (1536, 4096)
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.ls1.gamma",
        "norm.bias",
    } <= state.keys()
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(1.1365e9, rel=1e-3)


def bicubic_by_loop(table: torch.Tensor, side: int, offset: float) -> list[float]:
    """One row of positions resampled to `side`, as the official scale factor asks: kernel a = -0.75."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    row, out = table.tolist(), []
    for target in range(side):
        source = (target + 0.5) * len(row) / (side + offset) - 0.5
        near = range(math.floor(source) - 1, math.floor(source) + 3)
        out.append(sum(row[min(max(i, 0), len(row) - 1)] * kernel(source - i) for i in near))
    return out


@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_positions_are_resampled_as_the_official_code_does(offset):
    trunk = DinoTrunk(DinoArchitecture(width=64, depth=1), Resampling(offset=offset))
    column = torch.rand(TABLE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        trunk.pos_embed[0, 1:] = column.repeat_interleave(TABLE)[:, None]  # differs from row to row only
    found = trunk._positions((16, 5))[0, ::5, 0]
    torch.testing.assert_close(found, torch.tensor(bicubic_by_loop(column, 16, offset)), atol=1e-5, rtol=0)


def test_wrong_partial_and_foreign_files(tmp_path, randomised):
    state = dict(timm_model("vits14").state_dict())
    small = {
        name: torch.zeros(tensor.shape) for name, tensor in state.items() if not name.startswith("blocks.3")
    }
    torch.save(small, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"dinov2:vits14@.*missing: blocks\.3.* and \d+ more"):
        families["dinov2"]("vits14", tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"missing: register_tokens.*|misshapen: cls_token"):
        families["dinov2"]("vitb14_reg", tmp_path / "partial.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="not DINOv2 weights"):
        families["dinov2"]("vits14", tmp_path / "foreign.pth")


def test_unknown_members_and_a_missing_file():
    with pytest.raises(ConfigError, match=r"unknown DINOv2 member 'vitb16'; did you mean .*vitb14"):
        families["dinov2"]("vitb16", None)
    with pytest.raises(CheckpointError, match="dinov2:vitb14@FILE"):
        families["dinov2"]("vitb14", None)
