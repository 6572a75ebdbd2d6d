"""Small RADIO releases in their genuine layouts, against timm, transformers and hand-written code."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import CheckpointError, ConfigError, SizeError
from radio.hub import load_backbone
from radio.students.vit import ViT, ViTConfig, global_blocks
from radio.types import Backbone

from .releases import (
    CONDITIONER,
    DEPTH,
    GRID,
    HEADS,
    HIDDEN,
    MEAN,
    PATCH,
    STD,
    WIDTH,
    block,
    linear,
    mlp1,
    mlp2,
    named,
    norm,
    random,
    save_hugging_face,
    save_pickled,
    teacher,
    trunk,
)


def images(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def by_hand(
    tensors: dict[str, Tensor], pixels: Tensor, *, aligned: bool = False, patch: int = PATCH
) -> list[Tensor]:
    """Compute all tokens after every block, written from the description of the architecture."""
    x = (pixels - CONDITIONER["norm_mean"]) / CONDITIONER["norm_std"]
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    cut = x.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, p, p]
    cut = cut.permute(0, 2, 3, 1, 4, 5).reshape(len(x), rows * columns, -1)
    table = tensors["patch_generator.pos_embed"].view(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    side = max(rows, columns)
    table = F.interpolate(table, size=(side, side), mode="bilinear", align_corners=aligned)
    positions = table[..., :rows, :columns].flatten(2).transpose(1, 2)
    tokens = cut @ tensors["patch_generator.embedder.weight"].T + positions
    x = torch.cat([tensors["patch_generator.cls_token.token"].expand(len(x), -1, -1), tokens], dim=1)
    outputs = []
    for index in range(DEPTH):
        x = _block_by_hand(tensors, f"blocks.{index}", x, HEADS)
        outputs.append(_norm(tensors, "norm", x) if "norm.weight" in tensors else x)
    return outputs


def _norm(tensors: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def _linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _block_by_hand(tensors: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    def scaled(place: str, value: Tensor) -> Tensor:
        for kind in ("grandma", "gamma"):
            value = value * tensors.get(f"{name}.{place}.{kind}", 1.0)
        return value

    q, k, v = _linear(tensors, f"{name}.attn.qkv", _norm(tensors, f"{name}.norm1", x)).chunk(3, dim=-1)
    mixed = []
    for head in range(heads):
        part = slice(head * x.shape[-1] // heads, (head + 1) * x.shape[-1] // heads)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(x.shape[-1] // heads)).softmax(-1)
        mixed.append(weights @ v[..., part])
    x = x + scaled("ls1", _linear(tensors, f"{name}.attn.proj", torch.cat(mixed, dim=-1)))
    hidden = F.gelu(_linear(tensors, f"{name}.mlp.fc1", _norm(tensors, f"{name}.norm2", x)))
    return x + scaled("ls2", _linear(tensors, f"{name}.mlp.fc2", hidden))


def mlp2_by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    x = _linear(tensors, "fc1", x)
    for index in range(sum(name.startswith("blocks.") and name.endswith(".2.bias") for name in tensors)):
        x = x + _linear(tensors, f"blocks.{index}.2", F.gelu(_norm(tensors, f"blocks.{index}.0", x, 1e-5)))
    return _linear(tensors, "final.2", F.gelu(_norm(tensors, "final.0", x, 1e-5)))


def mlp1_by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    return _linear(tensors, "fc2", F.relu(_norm(tensors, "norm", _linear(tensors, "fc1", x), 1e-5)))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


V1_TEACHERS = (teacher("clip"), teacher("dino_v2"), teacher("sam", use_summary=False))


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (224, 224)])
def test_a_first_release_equals_its_description(tmp_path: Path, size: tuple[int, int]) -> None:
    """Three class tokens, five registers, a final norm, heads of the first kind by index."""
    weights, heads = (
        trunk(final_norm=True),
        {str(n): (mlp1(20 + n, 9 * n), mlp1(30 + n, 9 * n)) for n in range(3)},
    )
    model = load_backbone(f"radio:{save_pickled(tmp_path / 'r.pth.tar', weights, V1_TEACHERS, heads)}")
    pixels = images(*size)
    features, *_, last = model(pixels), *by_hand(weights, pixels)
    assert_close(features.summary, last[:, :2].flatten(1))
    assert_close(features.tokens, last[:, 8:])
    assert features.grid == (size[0] // PATCH, size[1] // PATCH)
    for slot, name in enumerate(("clip", "dino_v2", "sam")):
        summary, spatial = heads[str(slot)]
        mapped = model.adaptors[name](features)
        assert_close(mapped.tokens, mlp1_by_hand(spatial, last[:, 8:]))
        expected = mlp1_by_hand(summary, last[:, slot]) if slot < 2 else mapped.tokens.mean(dim=1)
        assert_close(mapped.summary, expected)
    with pytest.raises(ConfigError, match="does not hold the class token"):
        model.adaptors["sam"].adapt_summary(features.summary)


def test_intermediate_blocks_pass_the_final_norm(tmp_path: Path) -> None:
    weights = trunk(final_norm=True)
    model = load_backbone(f"radio:{save_pickled(tmp_path / 'r.pth.tar', weights, V1_TEACHERS)}")
    pixels = images(96, 128)
    assert model.num_blocks == DEPTH
    assert model.intermediate is not None
    found, expected = model.intermediate(pixels, [2, 0]), by_hand(weights, pixels)
    for features, index in zip(found, (2, 0), strict=True):
        assert_close(features.tokens, expected[index][:, 8:])
        assert_close(features.summary, expected[index][:, :2].flatten(1))


def test_heads_of_the_second_kind_by_name(tmp_path: Path) -> None:
    weights = trunk()
    heads = {"clip": (mlp2(20, 5, steps=2), mlp2(30, 40)), "dino_v2": (mlp2(24, 70, steps=0), mlp2(24, 90))}
    teachers = (teacher("clip"), teacher("dino_v2", token_slot=3))
    model = load_backbone(f"radio:{save_pickled(tmp_path / 'r.pth.tar', weights, teachers, heads)}")
    pixels = images(128, 96)
    features, last = model(pixels), by_hand(weights, pixels)[-1]
    assert_close(features.summary, last[:, [0, 3]].flatten(1))
    for name, slot in (("clip", 0), ("dino_v2", 3)):
        summary = model.adaptors[name].adapt_summary(features.summary)
        assert_close(summary, mlp2_by_hand(heads[name][0], last[:, slot]))
        mapped = model.adaptors[name](features, (4, 3))
        tokens = mlp2_by_hand(heads[name][1], last[:, 8:]).transpose(1, 2).unflatten(2, (8, 6))
        half = F.interpolate(tokens, size=(4, 3), mode="bilinear", align_corners=False)
        assert_close(mapped.map(), half)


def test_a_spatial_head_that_up_samples_gives_each_token_a_square(tmp_path: Path) -> None:
    weights, spatial = trunk(), mlp2(4 * 10, 3)
    path = save_pickled(
        tmp_path / "r.pth.tar",
        weights,
        [teacher("clip", fd_upsample_factor=2)],
        {"clip": (mlp2(9, 1), spatial)},
    )
    model = load_backbone(f"radio:{path}")
    features = model(images(64, 96))
    mapped, flat = model.adaptors["clip"](features), mlp2_by_hand(spatial, features.tokens)
    assert mapped.grid == (8, 12)
    for row, column in ((0, 0), (1, 4), (3, 5)):
        numbers = flat[:, row * 6 + column].view(2, 2, 2, 10)
        for y, x in ((0, 0), (0, 1), (1, 1)):
            assert_close(mapped.tokens[:, (2 * row + y) * 12 + 2 * column + x], numbers[:, y, x])


def test_a_spatial_head_with_attention(tmp_path: Path) -> None:
    weights = trunk(prefix=10)
    inner = mlp2(12, 33)
    spatial = block("blocks.0", WIDTH, 4 * WIDTH, 5, "gamma") | block(
        "blocks.1", WIDTH, 4 * WIDTH, 25, "gamma"
    )
    heads = {"dino_v3_7b": (mlp2(9, 1), spatial | named("mlp.", inner))}
    config = {"version": "c-radio_v4-h", "preferred_resolution": [96, 96]}
    file = save_hugging_face(tmp_path / "hf", weights, [0, 1], heads, config)
    model = load_backbone(f"radio:{file}")
    features = model(images(96, 64))
    x = features.tokens
    for name in ("blocks.0", "blocks.1"):
        x = _block_by_hand(spatial, name, x, 16)
    assert_close(model.adaptors["dino_v3_7b"](features).tokens, mlp2_by_hand(inner, x))
    last = by_hand(weights, images(96, 64))[-1]
    assert_close(
        model.adaptors["dino_v3_7b"](features).summary, mlp2_by_hand(heads["dino_v3_7b"][0], last[:, 1])
    )
    assert model.native_size == (96, 96)


def _timms(name: str, weights: dict[str, Tensor], file: Path, prefix: int, **options: Any) -> Any:
    overlay = {"state_dict": safetensors.torch.load_file(file), "num_classes": 0}
    return timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=0,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        pos_embed_grid_size=(GRID, GRID),
        reg_tokens=prefix - 1,
        **options,
    ).eval()


@pytest.mark.parametrize(
    ("name", "version", "prefix", "scale"),
    [
        ("naflexvit_base_patch16_radio_v3", "c-radio_v3-b", 8, "grandma"),
        ("naflexvit_large_patch16_radio_v3", "c-radio_v3-l", 8, "grandma"),
        ("naflexvit_huge_patch16_radio_v4", "c-radio_v4-h", 10, None),
    ],
)
def test_later_releases_equal_timms(
    tmp_path: Path, name: str, version: str, prefix: int, scale: str | None
) -> None:
    weights = trunk(prefix=prefix, scale=scale)
    slots = [0, 1, 2] if prefix == 8 else [0, 1]
    file = save_hugging_face(tmp_path / "hf", weights, slots, config={"version": version})
    model, network = load_backbone(f"radio:{file.parent}"), _timms(name, weights, file, prefix)
    for size in ((128, 128), (224, 224), (96, 160)):
        pixels = images(*size)
        normalised = (pixels - CONDITIONER["norm_mean"]) / CONDITIONER["norm_std"]
        with torch.no_grad():
            expected, features = network.forward_features(normalised), model(pixels)
        assert_close(features.tokens, expected[:, prefix:])
        assert_close(features.summary, expected[:, slots].flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix", "scale", "shape"),
    [
        ("base_patch16_radio_v3", 8, "grandma", (768, 12, 3072)),
        ("large_patch16_radio_v3", 8, "grandma", (1024, 2, 4096)),
        ("huge_patch16_radio_v3", 8, None, (1280, 2, 5120)),
        ("so400m_patch16_radio_v4", 10, None, (1152, 2, 4304)),
    ],
)
def test_releases_of_the_genuine_widths_equal_timms(
    tmp_path: Path, name: str, prefix: int, scale: str | None, shape: tuple[int, int, int]
) -> None:
    """The version is read off the shapes, since no config.json says it."""
    width, depth, hidden = shape
    weights = trunk(prefix=prefix, scale=scale, width=width, depth=depth, hidden=hidden, grid=128)
    file = save_hugging_face(tmp_path / "hf", weights, [0, 1])
    overlay = {"state_dict": safetensors.torch.load_file(file), "num_classes": 0}
    network: Any = timm.create_model(
        f"naflexvit_{name}", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, depth=depth
    ).eval()
    del weights, overlay
    model = load_backbone(f"radio:{file}")
    for size in ((224, 224), (512, 512), (384, 640)):
        pixels = images(*size)[:1]
        normalised = (pixels - CONDITIONER["norm_mean"]) / CONDITIONER["norm_std"]
        with torch.no_grad():
            expected, features = network.forward_features(normalised), model(pixels)
        torch.testing.assert_close(features.tokens, expected[:, prefix:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.summary, expected[:, :2].flatten(1), atol=1e-4, rtol=1e-4)


def test_a_version_in_the_spec_comes_first(tmp_path: Path) -> None:
    weights = trunk()
    file = save_hugging_face(tmp_path / "hf", weights, [0, 1, 2])
    pixels = images(64, 64)
    for spec, aligned in (
        (f"radio:{file}", False),
        (f"radio:v3-b@{file}", True),
        (f"radio:v3-l@{file}", False),
    ):
        expected = by_hand(weights, pixels, aligned=aligned)[-1]
        assert_close(load_backbone(spec)(pixels).tokens, expected[:, 8:])
    with pytest.raises(ConfigError, match=r"unknown RADIO version 'v3-x'"):
        load_backbone(f"radio:v3-x@{file}")


def test_released_models_equal_the_ones_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    weights = trunk(prefix=10)
    file = save_hugging_face(tmp_path / "hf", weights, [0, 1], config={"version": "c-radio_v4-h"})
    config = transformers.RadioConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        max_img_size=GRID * PATCH,
        num_cls_tokens=3,
        num_registers=7,
        norm_mean=list(MEAN),
        norm_std=list(STD),
    )
    peer = transformers.RadioModel(config).eval()
    state = {
        "embeddings.patch_projection.weight": weights["patch_generator.embedder.weight"],
        "embeddings.position_embedding": weights["patch_generator.pos_embed"],
        "embeddings.cls_register_token": weights["patch_generator.cls_token.token"],
        "input_conditioner.norm_mean": CONDITIONER["norm_mean"],
        "input_conditioner.norm_std": CONDITIONER["norm_std"],
        "summary_idxs": torch.tensor([0, 1]),
    }
    for index in range(DEPTH):
        ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
        for kind in ("weight", "bias"):
            q, k, v = weights[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for part, value in (("q", q), ("k", k), ("v", v), ("o", weights[f"{ours}.attn.proj.{kind}"])):
                state[f"{theirs}.attention.{part}_proj.{kind}"] = value
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{theirs}.{part}.{kind}"] = weights[f"{ours}.{part}.{kind}"]
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("layer_scale" in name for name in missing)
    pixels = images(96, 64)
    with torch.no_grad():
        expected, features = peer(pixels), load_backbone(f"radio:{file}")(pixels)
    assert_close(features.summary, expected.summary)
    assert_close(features.tokens, expected.features)


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    weights, averaged = trunk(), trunk()
    averaged["blocks.0.mlp.fc1.bias"] = averaged["blocks.0.mlp.fc1.bias"] + 1
    path = save_pickled(
        tmp_path / "r.pth.tar",
        weights,
        [teacher("clip")],
        {"0": (mlp2(9, 1), mlp2(9, 2))},
        state_dict_ema=named("module.base_model.", averaged),
    )
    torch.save(torch.load(path, weights_only=False), path)
    pixels = images(64, 64)
    model = load_backbone(f"radio:{path}")
    assert_close(model(pixels).tokens, by_hand(averaged, pixels)[-1][:, 8:])
    assert list(model.adaptors) == ["clip"]


def test_tokens_pass_the_feature_normaliser_and_adaptors_do_not(tmp_path: Path) -> None:
    weights, spatial = trunk(), mlp2(9, 2)
    mean, tx = random(4, WIDTH), 0.3 * torch.linalg.qr(random(5, WIDTH, WIDTH)).Q
    path = save_pickled(
        tmp_path / "r.pth.tar",
        weights,
        [teacher("clip")],
        {"0": (mlp2(9, 1), spatial)},
        extra={"_feature_normalizer.mean": mean, "_feature_normalizer.tx": tx},
    )
    model = load_backbone(f"radio:{path}")
    features, last = model(images(64, 64)), by_hand(weights, images(64, 64))[-1]
    assert_close(features.tokens, (last[:, 8:] - mean) @ tx.T)
    assert_close(features.summary, last[:, 0])
    assert_close(model.adaptors["clip"](features).tokens, mlp2_by_hand(spatial, last[:, 8:]))


def test_spectral_reparametrisation_is_folded_in_trunk_and_heads(tmp_path: Path) -> None:
    plain, head = trunk(), mlp2(9, 1)
    weights, reparametrised = dict(plain), {}
    for layer, parts in (("blocks.0.attn.qkv", 3), ("blocks.1.mlp.fc1", 1)):
        original = plain[f"{layer}.weight"]
        effective = []
        for index, part in enumerate(original.chunk(parts)):
            scale = 0.3 + index
            effective.append(part * (math.log1p(math.exp(scale)) + 0.05) / torch.linalg.svdvals(part)[0])
            name = f"{layer}.parametrizations.weight.0.{f'parts.{index}.' if parts > 1 else ''}"
            reparametrised[f"{name}scale"] = torch.tensor([[scale]])
            u, _, v = torch.linalg.svd(part)
            if index != 1:  # without the vectors the value is computed
                reparametrised |= {f"{name}_u": u[:, 0], f"{name}_v": v[0]}
        reparametrised[f"{layer}.parametrizations.weight.original"] = original
        weights[f"{layer}.weight"] = torch.cat(effective)
        del plain[f"{layer}.weight"]
    folded = dict(head)
    original = head.pop("fc1.weight")
    folded["fc1.weight"] = original * (math.log(2) + 0.05) / torch.linalg.svdvals(original)[0]
    head |= {
        "fc1.parametrizations.weight.original": original,
        "fc1.parametrizations.weight.0.scale": torch.zeros(1, 1),
    }
    path = save_pickled(
        tmp_path / "r.pth.tar", plain | reparametrised, [teacher("clip")], {"clip": (head, mlp2(9, 2))}
    )
    model, pixels = load_backbone(f"radio:{path}"), images(64, 64)
    features, last = model(pixels), by_hand(weights, pixels)[-1]
    assert_close(features.tokens, last[:, 8:])
    assert_close(model.adaptors["clip"](features).summary, mlp2_by_hand(folded, last[:, 0]))


def test_a_swiglu_trunk_under_inner(tmp_path: Path) -> None:
    weights = trunk(patch=14)
    for index in range(DEPTH):
        for layer in ("fc1", "fc2"):
            for kind in ("weight", "bias"):
                del weights[f"blocks.{index}.mlp.{layer}.{kind}"]
        weights |= linear(f"blocks.{index}.mlp.w12", 2 * 40, WIDTH, index)
        weights |= linear(f"blocks.{index}.mlp.w3", WIDTH, 40, index + 50)
    path = save_pickled(tmp_path / "r.pth.tar", named("inner.", weights), V1_TEACHERS)
    model = load_backbone(f"radio:{path}")
    assert model.patch_size == 14
    x = random(3, 2, 5, WIDTH)
    found = model.get_submodule("trunk.vit.blocks.0.mlp")(x)  # type: ignore[attr-defined]
    gate, value = _linear(weights, "blocks.0.mlp.w12", x).chunk(2, dim=-1)
    assert_close(found, _linear(weights, "blocks.0.mlp.w3", F.silu(gate) * value))
    assert model(images(28, 42)).grid == (2, 3)


def _windowed_by_hand(
    weights: dict[str, Tensor], pixels: Tensor, side: int, everywhere: tuple[int, ...]
) -> Tensor:
    """Compute the last tokens with windows, one window after another; class tokens skip windowed blocks."""
    grid = (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH)
    x = _embedded(weights, pixels)
    for index in range(DEPTH):
        if index in everywhere:
            x = _block_by_hand(weights, f"blocks.{index}", x, HEADS)
            continue
        plane = x[:, 8:].unflatten(1, grid).clone()
        for top in range(0, grid[0], side):
            for left in range(0, grid[1], side):
                window = plane[:, top : top + side, left : left + side]
                done = _block_by_hand(weights, f"blocks.{index}", window.flatten(1, 2), HEADS)
                plane[:, top : top + side, left : left + side] = done.unflatten(1, (side, side))
        x = torch.cat([x[:, :8], plane.flatten(1, 2)], dim=1)
    return x


def _embedded(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Compute the tokens before the first block: those after a block that adds nothing."""
    silent = dict(weights)
    for name in ("attn.proj", "mlp.fc2"):
        for kind in ("weight", "bias"):
            silent[f"blocks.0.{name}.{kind}"] = torch.zeros_like(weights[f"blocks.0.{name}.{kind}"])
    return by_hand(silent, pixels)[0]


def test_windows_are_those_of_vitdet(tmp_path: Path) -> None:
    weights = trunk()
    path = save_pickled(tmp_path / "r.pth.tar", weights, V1_TEACHERS)
    model, pixels = load_backbone(f"radio:v2@{path}", window=2), images(64, 128)
    everywhere = global_blocks(DEPTH, "runs-of-5")
    assert everywhere == (2,)
    expected = _windowed_by_hand(weights, pixels, 2, everywhere)
    features = model(pixels)
    assert_close(features.tokens, expected[:, 8:])
    assert_close(features.summary, expected[:, :2].flatten(1))
    assert model.window == 2
    assert model.nearest_size(100, 100) == (96, 96)
    assert model.with_window is not None
    wide = model.with_window(5)
    assert wide.native_size == wide.nearest_size(*wide.native_size) == (400, 400)
    assert wide.with_window is not None
    assert wide.with_window(None).native_size == (432, 432)
    late = load_backbone(f"radio:v4@{path}", window=2)  # a depth of 3 has no quarters: one global block
    torch.testing.assert_close(late(pixels).tokens, features.tokens)
    plain = load_backbone(f"radio:{path}")
    assert plain.window is None
    assert plain.fingerprint != model.fingerprint
    with pytest.raises(SizeError, match="nearest size that it can is 64x128"):
        model(images(64, 112))


def test_the_arguments_say_how_many_windowed_blocks_come_before_a_global_one(tmp_path: Path) -> None:
    weights, pixels = trunk(depth=6), images(64, 64)
    schedules = {}
    for windowed in (1, 2, 5):
        arguments = {"vitdet_num_windowed": windowed}
        path = save_pickled(tmp_path / f"{windowed}.pth.tar", weights, V1_TEACHERS, arguments=arguments)
        model = load_backbone(f"radio:v4@{path}", window=2)
        vit = model.get_submodule("trunk.vit")  # type: ignore[attr-defined]
        schedules[windowed] = global_blocks(6, vit.config.schedule)
        assert model(pixels).grid == (4, 4)
    assert schedules == {1: (1, 3, 5), 2: (2, 5), 5: (5,)}
    path = save_pickled(tmp_path / "r.pth.tar", weights, V1_TEACHERS, arguments={"vitdet_num_windowed": 0})
    with pytest.raises(CheckpointError, match=r"its args: vitdet_num_windowed"):
        load_backbone(f"radio:{path}")


def _broken(tmp_path: Path, change: Any) -> Path:
    weights = trunk()
    heads = {"0": (mlp2(9, 1), mlp2(9, 2))}
    path = save_pickled(tmp_path / "r.pth.tar", weights, [teacher("clip")], heads)
    data = torch.load(path, weights_only=False)
    change(data)
    torch.save(data, path)
    return path


class _Runs:
    """An object whose unpickling would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def _drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["state_dict"].pop(name)


def _put(name: str, value: Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["state_dict"].update({name: value})


def _name(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: setattr(data["args"], "teachers", [{**teacher("clip"), **changed}])


_ORIGINAL = "parametrizations.weight.original"
_EMBEDDER = "base_model.patch_generator.embedder.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("base_model.blocks.1.attn.qkv.bias"), r"missing: blocks\.1\.attn\.qkv\.bias"),
        (_drop("base_model.patch_generator.pos_embed"), r"wanted base_model\.patch_generator\.pos_embed"),
        (_put("base_model.blocks.0.extra", torch.ones(1)), r"unexpected: blocks\.0\.extra"),
        (_put("decoder.weight", torch.ones(1)), r"unexpected are decoder\.weight"),
        (_put("_heads.0.final.2.bias", torch.ones(3)), r"summary head of clip: .*misshapen"),
        (_drop("_heads.0.final.0.bias"), r"summary head of clip: .*missing: final\.0\.bias"),
        (_drop("_heads.0.fc1.weight"), r"no known kind of head"),
        (_put("base_model.norm.weight", torch.ones(WIDTH)), r"missing: norm\.bias"),
        (_put("base_model.blocks.0.norm1.bias", torch.full((WIDTH,), torch.nan)), r"hold NaN"),
        (_put(_EMBEDDER, torch.ones(WIDTH, 700)), r"not the shape of a RADIO ViT"),
        (_put("base_model.patch_generator.cls_token.token", torch.ones(3)), r"not the shape of a RADIO ViT"),
        (_name(name=3), r"its args: .*name"),
        (_name(token_slot=99), r"reads the class tokens \[99\]"),
        (_name(token_slot=-1, use_summary=False), r"its adaptors read \[-1\]"),
        (_name(fd_upsample_factor=-1), r"fd_upsample_factor: .*got -1"),
        (_name(name="keys"), r"no adaptor can be named 'keys'"),
        (_name(name="a.b"), r"no adaptor can be named 'a\.b'"),
        (_name(name=""), r"no adaptor can be named ''"),
        (
            lambda data: data["state_dict"].update(named("_feature_projections.clip.", mlp2(9, 2))),
            r"has two adaptors named 'clip'",
        ),
        (_put("_heads.²0.fc1.bias", torch.ones(48)), r"which class token the head of '²0' reads"),
        (_put("base_model.patch_generator.pos_embed", torch.ones(1, 0, 10**12)), r"not the shape of"),
        (_put(_EMBEDDER, torch.ones(WIDTH + 1, 3 * PATCH**2)), r"not the shape of a RADIO ViT"),
        (_put("base_model.blocks.0.mlp.w12.weight", torch.tensor(1.0)), r"unexpected: .*w12"),
        (_put("_heads.0.blocks.0.2.bias", torch.ones(0)), r"no known kind of head"),
        (_put("input_conditioner.norm_std", torch.zeros(3)), r"norm_std is .*above 0"),
        (_put("input_conditioner.norm_mean", torch.zeros(3) * 1j), r"norm_mean is complex64"),
        (_put("base_model.inner.blocks.0.norm1.bias", torch.ones(WIDTH)), r"inner\.blocks\.0\..* twice"),
        (_put("module.base_model.blocks.0.norm1.bias", torch.ones(WIDTH)), r"without wrappings"),
        (_put(f"base_model.x.{_ORIGINAL}", torch.tensor(1.0)), r"base_model\.x cannot be folded"),
        (_put(f"base_model.x.{_ORIGINAL}", torch.ones(4, 4, dtype=torch.int8)), r"not floating-point"),
        (_put(f"base_model.x.{_ORIGINAL}", torch.full((4, 4), torch.nan)), r"hold NaN"),
        (
            lambda data: data["state_dict"].update(
                named("_feature_normalizer.", {"mean": torch.ones(WIDTH), "tx": torch.ones(WIDTH, WIDTH)})
            ),
            r"normaliser has no inverse",
        ),
        (lambda data: data.pop("state_dict"), r"holds no tensors; wanted a state dict"),
        (lambda data: data.update(state_dict={3: torch.ones(1)}), r"its tensors have no names"),
        (lambda data: data.update(metadata="", sha256="", tensors={}, state_dict=None), r"of am-radio"),
    ],
)
def test_files_that_are_no_whole_release(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_backbone(f"radio:{_broken(tmp_path, change)}")


@pytest.mark.parametrize(
    "indices",
    [torch.tensor([0.5]), torch.tensor([0, 0]), torch.tensor([[0]]), torch.tensor([True]), torch.tensor(0)],
)
def test_summaries_of_no_list_of_class_tokens(tmp_path: Path, indices: Tensor) -> None:
    file = save_hugging_face(tmp_path / "hf", trunk(), [0])
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"radio_model.summary_idxs": indices}, file)
    with pytest.raises(CheckpointError, match="no list of different class tokens"):
        load_backbone(f"radio:{file}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "c-radio_v9-h"}, r"version 'c-radio_v9-h' is not known; .*radio:v4@FILE"),
        ({"preferred_resolution": 10**9}, r"config\.json: preferred_resolution"),
        ({"preferred_resolution": -5}, r"config\.json: preferred_resolution"),
    ],
)
def test_a_config_of_no_known_release(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    file = save_hugging_face(tmp_path / "hf", trunk(), [0], config=config)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(f"radio:{file}")


def test_a_head_that_cannot_up_sample_as_its_release_says(tmp_path: Path) -> None:
    path = _broken(tmp_path, _name(fd_upsample_factor=2))
    model = load_backbone(f"radio:{path}")
    with pytest.raises(ConfigError, match="no 2 x 2 tokens"):
        model.adaptors["clip"](model(images(64, 64)))


def test_adaptors_that_read_other_tokens_change_the_fingerprint(tmp_path: Path) -> None:
    found = set()
    for names, factor in ((("a", "b"), 1), (("b", "a"), 1), (("a", "b"), None), (("a", "b"), 3)):
        teachers = [teacher(name, fd_upsample_factor=factor) for name in names]
        heads = {"a": (mlp2(9, 1), mlp2(9, 2))}
        file = save_hugging_face(tmp_path / "hf", trunk(), [0, 1], heads, {"args": {"teachers": teachers}})
        found.add(load_backbone(f"radio:{file}").fingerprint)
    assert len(found) == 3


def test_the_first_head_of_a_teacher_that_is_listed_twice(tmp_path: Path) -> None:
    heads = {str(n): (mlp2(9, 1 + n), mlp2(9, 2 + n)) for n in range(2)}
    path = save_pickled(tmp_path / "r.pth.tar", trunk(), [teacher("clip"), teacher("clip")], heads)
    model = load_backbone(f"radio:{path}")
    features = model(images(64, 64))
    assert_close(
        model.adaptors["clip"](features).tokens,
        mlp2_by_hand(heads["0"][1], features.tokens),
    )


def test_averaged_weights_come_before_reparametrised_ones(tmp_path: Path) -> None:
    weights, averaged = trunk(), trunk()
    layer = "blocks.0.mlp.fc1"
    weights[f"{layer}.{_ORIGINAL}"] = 2 * weights.pop(f"{layer}.weight")
    path = save_pickled(
        tmp_path / "r.pth.tar",
        weights,
        [teacher("clip")],
        state_dict_ema=named("module.base_model.", averaged),
    )
    expected = by_hand(averaged, images(64, 64))[-1]
    assert_close(load_backbone(f"radio:{path}")(images(64, 64)).tokens, expected[:, 8:])


def test_a_path_may_hold_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "v1@mine"
    file = save_hugging_face(folder, trunk(), [0])
    assert load_backbone(f"radio:{file}").fingerprint == load_backbone(f"radio:v3-l@{file}").fingerprint


def test_a_state_dict_alone_and_arguments_of_none(tmp_path: Path) -> None:
    path = save_pickled(tmp_path / "r.pth.tar", trunk())
    expected = load_backbone(f"radio:{path}").fingerprint
    data = torch.load(path, weights_only=False)
    torch.save(data | {"args": None}, path)
    assert load_backbone(f"radio:{path}").fingerprint == expected
    torch.save(data["state_dict"], path)
    assert load_backbone(f"radio:{path}").fingerprint == expected


def test_a_summary_has_no_head_with_attention(tmp_path: Path) -> None:
    attention = block("blocks.0", WIDTH, 4 * WIDTH, 5, "gamma") | named("mlp.", mlp2(9, 1))
    heads = {"clip": (attention, attention)}
    path = save_pickled(tmp_path / "r.pth.tar", trunk(), [teacher("clip")], heads)
    with pytest.raises(CheckpointError, match="summary head of clip: has attention"):
        load_backbone(f"radio:{path}")


def test_a_width_whose_number_of_heads_is_unknown(tmp_path: Path) -> None:
    path = save_pickled(tmp_path / "r.pth.tar", trunk(width=100), [teacher("clip")])
    with pytest.raises(CheckpointError, match="not the shape of a RADIO ViT"):
        load_backbone(f"radio:{path}")


def test_states_of_the_training_are_passed_over(tmp_path: Path) -> None:
    extra = {
        "module._loss_states.0.mean": torch.ones(3),
        "adaloss.ema": torch.ones(3),
        "lean_in_expected_losses": torch.ones(2),
        "weight_balance_mask": torch.ones(2),
    }
    path = save_pickled(tmp_path / "r.pth.tar", trunk(), V1_TEACHERS, extra=extra)
    assert load_backbone(f"radio:{path}").token_dim == WIDTH


def test_a_norm_that_the_arguments_switch_off_is_not_applied(tmp_path: Path) -> None:
    weights = trunk()
    unused = norm("base_model.norm", WIDTH, 7) | norm("base_model.fc_norm", WIDTH, 9)
    path = save_pickled(
        tmp_path / "r.pth.tar", weights, V1_TEACHERS, extra=unused, arguments={"model_norm": False}
    )
    expected = by_hand(weights, images(64, 64))[-1]
    assert_close(load_backbone(f"radio:{path}")(images(64, 64)).tokens, expected[:, 8:])


@pytest.mark.parametrize(
    ("width", "depth", "heads", "published"), [(1280, 32, 16, 651_642_886), (1536, 40, 24, 1_159_618_566)]
)
def test_the_trunk_has_as_many_numbers_as_published(
    width: int, depth: int, heads: int, published: int
) -> None:
    """C-RADIOv3-H and g, which have no final norm and no bias in the patch embedding, but mean and std."""
    config = ViTConfig(
        name="radio",
        width=width,
        depth=depth,
        heads=heads,
        patch=16,
        positions=128,
        class_tokens=4,
        registers=4,
    )
    with torch.device("meta"):
        total = sum(weight.numel() for weight in ViT(config).parameters())
    assert total - 3 * width + 6 == published


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = _broken(tmp_path, lambda data: data.update(args=_Runs(trap)))
    with pytest.raises(CheckpointError, match="nothing was run"):
        load_backbone(f"radio:{path}")
    raw = tmp_path / "raw.pth.tar"
    raw.write_bytes(pickle.dumps(_Runs(trap)))
    with pytest.raises(CheckpointError):
        load_backbone(f"radio:{raw}")
    assert not trap.exists()


def test_an_absent_file_and_a_truncated_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_backbone(f"radio:{tmp_path / 'absent.pth.tar'}")
    with pytest.raises(CheckpointError, match=r"has no weights; wanted model\.safetensors, or its parts"):
        load_backbone(f"radio:{tmp_path}")
    file = save_hugging_face(tmp_path / "hf", trunk(), [0])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_backbone(f"radio:{file}")
    (tmp_path / "hf" / "config.json").write_text('{"version": 3}')
    save_hugging_face(tmp_path / "hf", trunk(), [0])
    with pytest.raises(CheckpointError, match=r"config\.json: .*version"):
        load_backbone(f"radio:{file}")


def test_a_release_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    whole = safetensors.torch.load_file(save_hugging_face(tmp_path / "whole", trunk(), [0, 1]))
    folder = tmp_path / "parts"
    folder.mkdir()
    names = sorted(whole)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        safetensors.torch.save_file({n: whole[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text('{"version": "c-radio_v3-l"}')
    found = load_backbone(f"radio:{folder}")(images(64, 64))
    assert_close(found.tokens, by_hand(trunk(), images(64, 64))[-1][:, 8:])


def test_an_adaptor_of_an_unknown_teacher_needs_the_config(tmp_path: Path) -> None:
    heads = {"mine": (mlp2(9, 1), mlp2(9, 2))}
    file = save_hugging_face(tmp_path / "hf", trunk(), [0, 1], heads)
    with pytest.raises(CheckpointError, match="which class token the head of 'mine' reads"):
        load_backbone(f"radio:{file}")
    config = {"args": {"teachers": [teacher("other"), teacher("mine")], "cls_token_per_teacher": True}}
    save_hugging_face(tmp_path / "hf", trunk(), [0, 1], heads, config)
    model: Backbone = load_backbone(f"radio:{file}")
    features, last = model(images(64, 64)), by_hand(trunk(), images(64, 64))[-1]
    assert_close(model.adaptors["mine"](features).summary, mlp2_by_hand(heads["mine"][0], last[:, 1]))
