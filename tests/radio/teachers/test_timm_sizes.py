"""timm's ViTs at any size and after any block, against timm's own forward at that size."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from radio.errors import CheckpointError, ConfigError, SizeError
from radio.hub import load_teacher
from radio.students import students
from radio.students.timm import TimmOptions, TimmStudent
from radio.types import Features, Teacher

create_model = timm.create_model  # tests replace timm's attribute

VIT = {"depth": 3, "embed_dim": 64, "num_heads": 2}
POOLED = VIT | {"num_heads": 8}  # Perception Encoder's attention pool has 8 heads of its own
HIERA = {"stages": (1, 2, 1, 1), "embed_dim": 16, "num_heads": 1, "global_att_blocks": (2,)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}

# Small networks of these names: depth and width are overridden, everything else is the genuine model's.
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch16_siglip_gap_224": VIT,
    "vit_so400m_patch14_siglip_384": VIT,  # its patch does not divide 384: its table is for 378
    "vit_base_patch14_reg1_tipsv2": VIT,
    "vit_pe_core_tiny_patch16_384": POOLED,
    "vit_pe_lang_gigantic_patch14_448": VIT,  # no class token
    "vit_pe_spatial_tiny_patch16_512": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_reg4_gap_256": VIT,  # fc_norm: only the mean is normalised
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "eva02_base_patch14_448": VIT,
    "vit_small_patch16_rope_mixed_ape_224": VIT,
    "beit3_base_patch16_224": VIT,
    "naflexvit_base_patch16_siglip": VIT,
    "naflexvit_base_patch16_par_gap": VIT,
    "naflexvit_base_patch16_radio_v3": VIT,
    "naflexvit_so400m_patch16_radio_v4": VIT,
}
OTHERS: dict[str, dict[str, Any]] = {
    "sam2_hiera_tiny": HIERA,
    "convnext_tiny.dinov3_lvd1689m": CONVNEXT,
}
FIXED: dict[str, dict[str, Any]] = {"beit_base_patch16_224": VIT, "vit_relpos_small_patch16_224": VIT}
RADIO = {
    "vit_base_patch16_radio_v3": "naflexvit_base_patch16_radio_v3",  # aligned corners
    "vit_large_patch16_radio_v3": "naflexvit_large_patch16_radio_v3",
    "vit_so400m_patch16_radio_v4": "naflexvit_so400m_patch16_radio_v4",
}


@pytest.fixture
def small(monkeypatch, randomised, tmp_path):
    """Makes timm build small networks of a name: a random one as timm builds it, and its weights' spec."""

    def make(name: str, options: dict[str, Any]) -> tuple[Any, str]:
        monkeypatch.setattr(timm, "create_model", functools.partial(create_model, **options))
        network = randomised(create_model(name, num_classes=0, **options))
        path = tmp_path / f"{name}.pth"
        torch.save(network.state_dict(), path)
        return network, f"timm:{name}@{path}"

    return make


def inputs(network: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], and as the network takes them."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return images, (images - mean) / std


def at_size(network: Any, size: tuple[int, int]) -> Any:
    """The network as timm resizes it for good; one that takes any size by itself as it is."""
    if not isinstance(network, VisionTransformer | Eva) or network.dynamic_img_size:
        return network
    resized = copy.deepcopy(network)
    resized.set_input_size(size)
    return resized


def check(features: Features, network: Any, images: Tensor) -> None:
    """Compare features with what timm's network of that size computes."""
    last = network.forward_features(images)
    pooled = network.forward_head(last, pre_logits=True)
    torch.testing.assert_close(features.summary, pooled, atol=1e-5, rtol=1e-5)
    if last.ndim == 3:
        tokens = last[:, network.num_prefix_tokens :]
    else:
        tokens = last.flatten(1, 2) if last.shape[-1] == features.tokens.shape[-1] else last.flatten(2).mT
    torch.testing.assert_close(features.tokens, tokens, atol=1e-5, rtol=1e-5)


def three_sizes(teacher: Teacher) -> list[tuple[int, int]]:
    patch, native = teacher.patch_size, teacher.native_size
    return [native, (3 * patch, 5 * patch), (native[0] + 2 * patch, native[1] + 2 * patch)]


@pytest.mark.parametrize(("name", "options"), list((NETWORKS | OTHERS).items()))
@torch.inference_mode()
def test_any_multiple_of_the_patch_gives_timms_features(name, options, small):
    network, spec = small(name, options)
    teacher = load_teacher(spec)
    native = network.pretrained_cfg["input_size"][1]
    assert not teacher.fixed_size
    assert teacher.native_size == (native // teacher.patch_size * teacher.patch_size,) * 2
    for size in three_sizes(teacher):
        images, normalised = inputs(network, size)
        features = teacher(images)
        assert features.grid == (size[0] // teacher.patch_size, size[1] // teacher.patch_size)
        check(features, at_size(network, size), normalised)
    with pytest.raises(SizeError, match="cannot take"):
        teacher(torch.rand(1, 3, native + 1, native))


@pytest.mark.parametrize(("name", "options"), list((NETWORKS | FIXED).items()))
@torch.inference_mode()
def test_features_after_a_block_are_those_of_the_network_cut_there(name, options, small):
    network, spec = small(name, options)
    teacher = load_teacher(spec)
    assert teacher.num_blocks == 3 and teacher.intermediate is not None
    size = teacher.native_size if teacher.fixed_size else (3 * teacher.patch_size, 4 * teacher.patch_size)
    images, normalised = inputs(network, size)
    resized = at_size(network, size)
    for block, features in zip([2, 0, 1, 0], teacher.intermediate(images, [2, 0, 1, 0]), strict=True):
        cut = copy.deepcopy(resized)
        cut.blocks = cut.blocks[: block + 1]
        check(features, cut, normalised)
    with pytest.raises(ConfigError, match="block 3 is not one of the 3 of timm:"):
        teacher.intermediate(images, [3])


def nvidia_layout(network: NaFlexVit) -> dict[str, Tensor]:
    """A RADIO's weights as they are published: one table, all class and register tokens as one."""
    state = network.state_dict()
    tensors = {
        "patch_generator.embedder.weight": state["embeds.proj.weight"].unflatten(1, (16, 16, 3)),
        "patch_generator.pos_embed": state["embeds.pos_embed"].flatten(1, 2),
        "patch_generator.cls_token.token": torch.cat(
            (state["embeds.cls_token"], state["embeds.reg_token"]), dim=1
        )[0],
    } | {key: tensor for key, tensor in state.items() if key.startswith("blocks.")}
    embedder = tensors["patch_generator.embedder.weight"].permute(0, 3, 1, 2).flatten(1)
    tensors["patch_generator.embedder.weight"] = embedder
    more = {
        "radio_model.summary_idxs": torch.tensor([0, 1]),
        "radio_model.input_conditioner.norm_mean": torch.ones(3, 1, 1),
    }
    return {f"radio_model.model.{key}": tensor for key, tensor in tensors.items()} | more


@pytest.mark.parametrize(("name", "twin"), list(RADIO.items()))
@torch.inference_mode()
def test_radio_keeps_all_its_positions(name, twin, small, tmp_path):
    small(name, VIT)
    network, spec = small(twin, VIT)
    network.embeds.proj.bias.zero_()
    published = nvidia_layout(network)
    torch.save(network.state_dict(), spec.partition("@")[2])
    torch.save(published, tmp_path / "nvidia.pth")
    teachers = [
        load_teacher(f"timm:{name}@{tmp_path / 'nvidia.pth'}"),
        load_teacher(f"timm:{twin}@{tmp_path / 'nvidia.pth'}"),
        load_teacher(f"timm:{name}@{tmp_path / twin}.pth"),
    ]
    assert teachers[0].native_size == (512, 512)
    network.double()  # the two classes add up a patch's pixels in another order
    for teacher in teachers:
        teacher.to(torch.device("cpu"), torch.float64)
    for size in three_sizes(teachers[0]):
        images, normalised = inputs(network, size)
        classic = create_model(  # timm resamples the published table for this size while it loads it
            name,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": dict(published)},
            num_classes=0,
            img_size=size,
            **VIT,
        ).eval()
        for teacher in teachers:
            check(teacher(images), network, normalised.double())
            check(teacher(images), classic.double(), normalised.double())


def test_a_radio_table_resampled_by_timm_is_refused(small):
    _, spec = small("vit_base_patch16_radio_v3", VIT)
    with pytest.raises(
        CheckpointError,
        match=r"embeds\.pos_embed \(1, 32, 32, 64\) instead of \(1, 128, 128, 64\) \(.* take NVIDIA's",
    ):
        load_teacher(spec)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_small_patch16_dinov3", "vit_base_patch16_radio_v3"]
)
def test_students_take_any_size_and_have_blocks(name, small):
    small(name, VIT)
    student = students[f"timm:{name}"](TimmOptions(image_size=96)).train()
    assert isinstance(student, TimmStudent)
    assert (student.native_size, student.fixed_size, student.num_blocks) == ((96, 96), False, 3)
    assert student.nearest_size(100, 130) == (96, 128)
    images = torch.rand(2, 3, 64, 96)
    features = student(images)
    assert features.grid == (4, 6)
    (features.summary.square().mean() + features.tokens.square().mean()).backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert student.intermediate is not None
    first, last = student.intermediate(images, [0, 2])
    assert not torch.equal(first.tokens, last.tokens)
    torch.testing.assert_close(last.tokens, features.tokens)
    torch.testing.assert_close(last.summary, features.summary)
    with pytest.raises(ConfigError, match="block -1 is not one of the 3 of timm:"):
        student.intermediate(images, [-1])
    with pytest.raises(SizeError, match="nearest size is 64x96"):
        student.intermediate(torch.rand(2, 3, 60, 96), [0])


def test_a_students_table_is_made_for_its_size(small):
    small("vit_base_patch16_siglip_224", VIT)
    student = students["timm:vit_base_patch16_siglip_224"](TimmOptions(image_size=96))
    assert student.state_dict()["trunk.network.pos_embed"].shape == (1, 36, 64)


def test_convolutional_models_have_no_blocks():
    student = students["timm:test_resnet"](TimmOptions())
    assert (student.num_blocks, student.intermediate) == (0, None)


@pytest.mark.parametrize(
    ("name", "native", "patch", "width", "blocks"),
    [
        ("vit_7b_patch16_dinov3", 256, 16, 4096, 40),
        ("vit_giantopt_patch16_siglip_384", 384, 16, 1536, 40),
        ("vit_giant_patch14_reg1_tipsv2", 448, 14, 1536, 40),
        ("vit_pe_core_gigantic_patch14_448", 448, 14, 1536, 50),
        ("vit_giant_patch16_radio_v3", 512, 16, 1536, 40),
        ("naflexvit_huge_patch16_radio_v4", 512, 16, 1280, 32),
        ("vit_giant_patch14_reg4_dinov2", 518, 14, 1536, 40),
        ("eva02_enormous_patch14_clip_224", 224, 14, 1792, 64),
        ("sam2_hiera_large", 1024, 32, 1152, 0),
        ("convnext_large.dinov3_lvd1689m", 224, 32, 1536, 0),
        ("samvit_huge_patch16", 1024, 16, 256, 0),
        ("efficientvit_b0", 224, 32, 128, 0),
    ],
)
def test_genuine_models_on_the_meta_device_need_no_file(name, native, patch, width, blocks):
    teacher = load_teacher(f"timm:{name}", meta=True)
    assert isinstance(teacher, nn.Module)
    assert all(tensor.is_meta for tensor in (*teacher.parameters(), *teacher.buffers()))
    assert (teacher.native_size, teacher.patch_size) == ((native, native), patch)
    assert (teacher.token_dim, teacher.num_blocks) == (width, blocks)
    features = teacher(torch.empty(1, 3, native, native, device="meta"))
    assert features.tokens.shape == (1, (native // patch) ** 2, width)


def test_weights_that_timm_would_leave_random_are_missing(small):
    network, spec = small("vit_base_patch16_siglip_gap_224", VIT)
    path = spec.partition("@")[2]
    state = network.state_dict()
    pool = {"attn_pool.latent": torch.zeros(1, 1, 64)}  # the genuine files have one
    torch.save(state | pool, path)
    load_teacher(spec)
    del state["blocks.2.mlp.fc2.bias"]
    torch.save(state | pool, path)
    with pytest.raises(CheckpointError, match=r"siglip_gap_224: missing: blocks\.2\.mlp\.fc2\.bias;"):
        load_teacher(spec)
