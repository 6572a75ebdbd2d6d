"""The ViT students: features, windows, sizes, gradients and parameter counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from radio.checkpoint import digest
from radio.config import to_plain
from radio.errors import ConfigError, SizeError
from radio.students import StudentOptions, options_type, resolve_options, students
from radio.students.vit import ViT, ViTDetOptions, ViTOptions, global_blocks

TOKENS = [(1, 0), (3, 4), (1, 4), (0, 2), (0, 0)]  # class tokens, registers


def _images(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _close(found, wanted, atol: float = 1e-5) -> None:
    assert found.grid == wanted.grid
    torch.testing.assert_close(found.summary, wanted.summary, rtol=0, atol=atol)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=atol)


@pytest.mark.parametrize(("class_tokens", "registers"), TOKENS)
@pytest.mark.parametrize("window", [None, 2, 4])
@torch.inference_mode()
def test_features_equal_a_loop_over_images_and_windows(
    small_vit, forward_by_loop, class_tokens, registers, window
):
    vit = small_vit(class_tokens=class_tokens, registers=registers, window=window)
    images = _images(2, 32, 48)
    crops = vit.sample_crops(2, torch.Generator().manual_seed(2))
    _close(vit(images), forward_by_loop(vit, images))
    _close(vit(images, crops), forward_by_loop(vit, images, crops))
    assert vit(images).summary.shape == (2, vit.summary_dim)


@pytest.mark.parametrize(("grid", "window"), [((72, 72), 8), ((72, 72), 9), ((72, 72), 18), ((36, 72), 12)])
@torch.inference_mode()
def test_windows_at_72_by_72_with_class_and_register_tokens(small_vit, forward_by_loop, grid, window):
    vit = small_vit(depth=4, schedule="runs-of-5", window=window, class_tokens=2, registers=3)
    images = _images(1, 4 * grid[0], 4 * grid[1])
    _close(vit(images), forward_by_loop(vit, images))


@torch.inference_mode()
def test_one_window_over_the_image_is_not_global_attention(small_vit):
    windowed = small_vit(window=8, class_tokens=1, registers=2)
    images = _images(2, 32, 32)
    one, everywhere = windowed(images), windowed.with_window(None)(images)
    assert (one.tokens - everywhere.tokens).abs().max() > 0.05
    assert (one.summary - everywhere.summary).abs().max() > 0.05
    bare = small_vit(window=8, class_tokens=0)  # without tokens that skip windows, it is
    _close(bare(images), bare.with_window(None)(images))


@torch.inference_mode()
def test_class_tokens_skip_windowed_blocks_unchanged(small_vit):
    vit = small_vit(window=4)  # block 1 is the first global one
    before, after = vit.intermediate(_images(2, 32, 32), [0, 1])
    assert torch.equal(before.summary, vit.norm(vit.prefix[:, 0]).expand(2, -1))
    assert (after.summary[0] - after.summary[1]).abs().max() > 1e-3


def test_with_window_shares_the_weights_and_leaves_the_original(small_vit):
    vit = small_vit(window=4)
    images = _images(2, 32, 32)
    before, config = vit(images), vit.config
    twin = vit.with_window(2)
    assert {name: p.data_ptr() for name, p in twin.named_parameters()} == {
        name: p.data_ptr() for name, p in vit.named_parameters()
    }
    assert vit.config is config and twin.config == replace(config, window=2)
    assert torch.equal(vit(images).tokens, before.tokens)
    assert not torch.allclose(twin(images).tokens, before.tokens)
    vit.zero_grad()
    twin(images).tokens.square().mean().backward()
    without = [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    with pytest.raises(SizeError, match="a window of 0 tokens cannot be"):
        vit.with_window(0)


def test_sizes_that_do_not_fit_are_errors_that_name_the_nearest(small_vit):
    vit = small_vit(window=4)
    with pytest.raises(SizeError, match=r"cannot take 30x34 px: its patch of 4 .* nearest size is 32x32"):
        vit(_images(1, 30, 34))
    with pytest.raises(SizeError, match=r"a 6x8 grid does not divide into 4x4 windows; .*: 1 and 2;"):
        vit(_images(1, 24, 32))


@pytest.mark.parametrize("window", [None, 3])
def test_fit_is_the_nearest_size_that_it_takes(small_vit, window):
    vit = small_vit(window=window)
    step = 4 * (window or 1)
    accepted = range(step, 420, step)
    for height, width in ((1, 399), (17, 30), (96, 97), (200, 215), (6, 18)):
        fitting = vit.nearest_size(height, width)
        for asked, got in zip((height, width), fitting, strict=True):
            assert got in accepted
            assert abs(got - asked) == min(abs(size - asked) for size in accepted)
        vit(torch.zeros(1, 3, *vit.nearest_size(6, 18)))


@torch.inference_mode()
def test_intermediate_features_are_those_of_a_shorter_vit(small_vit):
    vit = small_vit(class_tokens=2, registers=1)
    images = _images(2, 16, 24)
    found = vit.intermediate(images, [5, 0, 7, 2])
    for index, features in zip([5, 0, 7, 2], found, strict=True):
        short = small_vit(class_tokens=2, registers=1, depth=index + 1)
        short.load_state_dict({k: v for k, v in vit.state_dict().items() if k in short.state_dict()})
        _close(features, short(images), atol=0)
    _close(found[2], vit(images), atol=0)
    with pytest.raises(ConfigError, match="block 8 is not one of the 8"):
        vit.intermediate(images, [8])
    with pytest.raises(ConfigError, match=r"no block of .* is named"):
        vit.intermediate(images, [])


@pytest.mark.parametrize(
    "changes", [{}, {"window": 2}, {"stem": "conv"}, {"layer_scale": 0.1}, {"window": 8}]
)
@pytest.mark.parametrize(("class_tokens", "registers"), TOKENS)
def test_gradients_are_finite_and_the_same_with_recomputation(small_vit, changes, class_tokens, registers):
    shape = {"class_tokens": class_tokens, "registers": registers, "width": 64, **changes}
    images, gradients, outputs = _images(3, 32, 32), [], []
    for activation_checkpointing in (False, True):
        vit = small_vit(activation_checkpointing=activation_checkpointing, **shape).train()
        crops = vit.sample_crops(3, torch.Generator().manual_seed(0))
        features = vit(images, crops)
        (features.summary.square().sum() + features.tokens.square().sum().mul(0.1)).backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
        outputs.append(features)
    _close(outputs[1], outputs[0], atol=0)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.numel() == 0 or name == "prefix" or gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def _parameters(width, depth, hidden, patch, side, prefix) -> int:
    """Of a ViT with a linear stem, term by term."""
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    norms = 2 * 2 * width
    stem = 3 * patch * patch * width + width
    return depth * (attention + mlp + norms) + stem + side * side * width + prefix * width + 2 * width


@pytest.mark.parametrize(
    ("name", "shape", "millions"),
    [
        ("vit-s16", (384, 12, 1536, 16, 128), 21.6),
        ("vit-s14", (384, 12, 1536, 14, 75), 21.6),
        ("vit-b32", (768, 12, 3072, 32, 64), None),
        ("vit-b16", (768, 12, 3072, 16, 128), None),
        ("vit-b14", (768, 12, 3072, 14, 75), None),
        ("vit-l14", (1024, 24, 4096, 14, 75), 304),
        ("vit-h14", (1280, 32, 5120, 14, 75), 632),
        ("vit-so400m14", (1152, 27, 4304, 14, 75), 412),  # SigLIP's: 412 million without its pooling
        ("vit-g14", (1408, 40, 6144, 14, 75), 1011),
    ],
)
def test_parameter_counts(name, shape, millions):
    with torch.device("meta"):
        built = {prefix: students[prefix + name[3:]](StudentOptions()) for prefix in ("vit", "vitdet")}
        more = students[name](ViTOptions(class_tokens=3, registers=4))
    counts = {key: sum(p.numel() for p in vit.parameters()) for key, vit in built.items()}
    assert counts["vit"] == counts["vitdet"] == _parameters(*shape, 1)
    assert sum(p.numel() for p in more.parameters()) == _parameters(*shape, 7)
    positions = shape[4] ** 2 * shape[0]
    if millions is None:  # the trunk without its table of positions: ViT-B, 86 to 88 million
        assert 85.5e6 < counts["vit"] - positions < 88.5e6
    elif name == "vit-h14":  # with the table
        assert counts["vit"] == pytest.approx(millions * 1e6, rel=0.01)
    else:
        assert counts["vit"] - positions == pytest.approx(millions * 1e6, rel=0.01)


def test_without_prefix_tokens_there_is_no_empty_parameter_and_the_files_stay(small_vit):
    pooled = small_vit(class_tokens=0, registers=0)
    assert all(parameter.numel() for parameter in pooled.parameters())
    assert pooled.state_dict()["prefix"].shape == (1, 0, pooled.config.width)  # as it always was in files
    pooled.load_state_dict(pooled.state_dict(), strict=True)
    assert "prefix" in dict(small_vit(class_tokens=0, registers=1).named_parameters())


def test_a_schedule_that_cannot_be_is_told_when_the_student_is_made():
    with torch.device("meta"):
        by_number = students["vitdet-so400m14"](ViTDetOptions(schedule=3))
    assert isinstance(by_number, ViT) and by_number._global_blocks() == (8, 17, 26)
    with pytest.raises(ConfigError, match="a depth of 4 does not have 4 parts"):
        students["vitdet-tiny12"](ViTDetOptions(schedule="quarters"))


def test_options_reach_the_student_and_impossible_ones_are_errors():
    options = ViTOptions(class_tokens=2, registers=3, stem="linear", activation_checkpointing=True)
    vit = students["vit-tiny12"](options)
    assert isinstance(vit, ViT) and vit.summary_dim == 256 and vit.prefix.shape == (1, 5, 128)
    assert vit.config.stem == "linear" and vit.config.activation_checkpointing and vit.native_size == (96, 96)
    windowed = students["vitdet-b16"](ViTDetOptions(window=2, schedule="runs-of-5"))
    assert isinstance(windowed, ViT) and windowed.config.window == 2
    assert windowed.config.schedule == "runs-of-5"
    with pytest.raises(ConfigError, match=r"vitdet-tiny12.window: 0 is out of bounds; .* at least 1"):
        students["vitdet-tiny12"](ViTDetOptions(window=0))
    with pytest.raises(ConfigError, match=r"vit-tiny12.class_tokens: -1 is out of bounds; .* at least 0"):
        students["vit-tiny12"](ViTOptions(class_tokens=-1))


def test_a_student_has_the_options_of_its_family():
    assert [options_type(name) for name in ("vit-b16", "vitdet-b16")] == [ViTOptions, ViTDetOptions]
    assert resolve_options("vitdet-b16", StudentOptions(activation_checkpointing=True)) == ViTDetOptions(
        activation_checkpointing=True
    )
    with pytest.raises(ConfigError, match="student 'vit-b16' has ViTOptions, got ViTDetOptions; give it its"):
        resolve_options("vit-b16", ViTDetOptions(window=4))


def test_every_windowed_student_has_windowed_blocks_and_takes_its_native_size():
    for name in students:
        if not name.startswith("vitdet-"):
            continue
        with torch.device("meta"):
            vit = students[name](StudentOptions())
        assert isinstance(vit, ViT) and vit.config.window is not None
        assert len(global_blocks(vit.config.depth, vit.config.schedule)) < vit.config.depth
        assert vit.native_size == vit.nearest_size(*vit.native_size)
        assert abs(vit.native_size[0] - vit.config.native) <= vit.config.patch * vit.config.window // 2


def test_the_fingerprint_is_of_weights_and_shape_but_not_of_recomputation(small_vit):
    vit = small_vit(window=4)
    same = {small_vit(window=4).fingerprint, small_vit(window=4, activation_checkpointing=True).fingerprint}
    assert same == {vit.fingerprint}
    assert vit.with_window(2).fingerprint != vit.fingerprint
    nn.init.zeros_(vit.norm.bias[:1].data).add_(1)
    assert vit.fingerprint not in same


def test_without_cpe_a_vit_has_a_position_for_each_native_patch_in_training_too():
    vits = [students["vit-tiny12"](ViTOptions(cpe=cpe)) for cpe in (True, False)]
    assert [vit.positions.side for vit in vits] == [16, 8]  # 96 px are 8 patches of 12
    assert vits[0].sample_crops(2, torch.Generator()).shape == (2, 5)
    plain = vits[1].train()
    assert plain.sample_crops(2, torch.Generator()) is None
    table = plain.positions.table.detach()
    assert torch.equal(plain.positions((8, 8)), table)
    larger = resample_abs_pos_embed(  # timm's
        table, (14, 14), (8, 8), num_prefix_tokens=0, interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(plain.positions((14, 14)), larger, rtol=0, atol=1e-6)
    plain(_images(2, 96, 96)).tokens.square().sum().backward()
    assert plain.positions.table.grad.abs().amin() > 0  # no position is skipped or dropped


def test_cpe_concerns_training_alone(small_vit):
    vit, without = small_vit(), small_vit(cpe=False)
    _close(vit(_images(2, 32, 32)), without(_images(2, 32, 32)), atol=0)
    assert vit.fingerprint == without.fingerprint
    shape = to_plain(vit.config)
    del shape["cpe"]  # as before the option existed
    assert vit.fingerprint == digest(vit.state_dict(), json.dumps(shape, sort_keys=True))
