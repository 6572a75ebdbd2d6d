"""Warm starts against the features of the model that the weights come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from radio.checkpoint import load
from radio.errors import CheckpointError, ConfigError
from radio.hub import load_backbone, load_teacher
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.nn.vit import Block
from radio.students import StudentOptions, ViTOptions
from radio.students.timm import TimmOptions
from tests.radio.teachers.releases import save_pickled, teacher, trunk
from train.config import NormaliseConfig, TrainConfig
from train.warm_start import warm_start

from .conftest import Start, losses_of

CLIP = AdaptorConfig(name="clip", summary_dim=12, token_dim=24)
DENSE = AdaptorConfig(name="dense", summary_dim=16, token_dim=16)


def model(
    student: str, options: StudentOptions | None = None, *adaptors: AdaptorConfig, seed: int = 0
) -> RadioModel:
    return build(
        ModelConfig(student=student, options=options or StudentOptions(), adaptors=adaptors), seed
    ).eval()


def started(fresh: RadioModel, spec: str) -> list[str]:
    """What is told while a model starts from a spec."""
    lines: list[str] = []
    assert len(warm_start(fresh, spec, lines.append).fingerprint) == 64
    return lines


def save_timm(path: Path, name: str, **options: Any) -> str:
    torch.manual_seed(1)
    network = timm.create_model(name, **options)
    for weight in network.parameters():
        if weight.ndim < 2:  # biases and scales that tell one from another
            nn.init.normal_(weight, std=0.05)
    safetensors.torch.save_file(network.state_dict(), path)
    return f"timm:{name}@{path}"


def check_same_features(one: Any, other: Any, side: int = 224) -> None:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours, theirs = one(images), other(images)
    assert torch.allclose(ours.tokens, theirs.tokens, atol=2e-4)
    assert torch.allclose(ours.summary, theirs.summary, atol=2e-4)


def test_our_vit_from_timms_has_its_features(tmp_path: Path) -> None:
    spec = save_timm(tmp_path / "vit.safetensors", "vit_small_patch16_224")
    fresh = model("vit-s16", ViTOptions(cpe=False), CLIP)
    lines = started(fresh, spec)
    check_same_features(fresh, load_teacher(spec))
    assert lines[0] == f"starts from {spec}: its trunk"
    assert lines[1:] == ["not taken, and fresh: adaptors: clip (not in it)"]


def test_a_timm_student_from_timms_has_its_features(tmp_path: Path) -> None:
    spec = save_timm(tmp_path / "vit.safetensors", "vit_tiny_patch16_224")
    fresh = model("timm:vit_tiny_patch16_224")
    assert started(fresh, spec) == [f"starts from {spec}: its trunk"]
    check_same_features(fresh, load_teacher(spec))
    larger = model("timm:vit_tiny_patch16_224", TimmOptions(image_size=256))
    assert "14x14 to 16x16" in started(larger, spec)[0]
    given, own = (m.state_dict()["student.trunk.network.pos_embed"] for m in (fresh, larger))
    wanted = timm.layers.resample_abs_pos_embed(given, new_size=(16, 16), num_prefix_tokens=1)
    assert torch.allclose(own, wanted, atol=1e-5)


def test_our_vit_from_a_release_has_its_features(tmp_path: Path) -> None:
    weights = trunk(1, width=384, depth=12, hidden=1536, grid=14, final_norm=True, scale="grandma")
    path = save_pickled(tmp_path / "r.pth.tar", weights, [teacher("clip")])
    fresh = model("vit-s16", ViTOptions(cpe=False))
    assert started(fresh, f"radio:{path}") == [f"starts from radio:{path}: its trunk"]
    check_same_features(fresh, load_backbone(f"radio:{path}"))


def test_scales_are_folded_and_registers_taken(tmp_path: Path) -> None:
    spec = save_timm(tmp_path / "d.safetensors", "vit_small_patch14_reg4_dinov2", num_classes=0)
    fresh = model("vit-s14", ViTOptions(registers=4))
    lines = started(fresh, spec)
    assert lines == [f"starts from {spec}: its trunk (positions resized: 37x37 to 75x75)"]
    source: Any = load_teacher(spec)
    network, student = source.trunk.network, fresh.get_submodule("student")
    tokens = torch.randn(2, 7, 384)
    block = student.get_submodule("blocks.3")
    assert isinstance(block, Block)
    with torch.inference_mode():
        assert torch.allclose(block(tokens), network.blocks[3](tokens), atol=1e-4)
    prefix = torch.cat((network.cls_token, network.reg_token), 1)
    assert torch.equal(student.state_dict()["prefix"], prefix)


def test_a_checkpoint_of_ours_with_the_adaptors_that_fit(tmp_path: Path) -> None:
    source = model("vit-tiny12", ViTOptions(), CLIP, DENSE, seed=1)
    source.save(tmp_path / "a.pt")
    same = model("vitdet-tiny12", None, CLIP, replace(DENSE, token_dim=20))
    lines = started(same, str(tmp_path / "a.pt"))
    assert lines == [
        f"starts from {tmp_path / 'a.pt'}: its trunk, and the adaptors clip",
        "not taken, and fresh: adaptors: dense (of other widths, or for another class token)",
    ]
    wanted, found = source.state_dict(), same.state_dict()
    for name in found:
        equal = torch.equal(found[name], wanted[name]) if "adaptors.dense.spatial" not in name else True
        assert equal or name.startswith("adaptors.dense"), name
    assert not torch.equal(
        found["adaptors.dense.summary.layers.0.weight"], wanted["adaptors.dense.summary.layers.0.weight"]
    )


def test_other_class_tokens_stay_fresh_and_the_table_is_resized(tmp_path: Path) -> None:
    model("vit-tiny12", ViTOptions(), seed=1).save(tmp_path / "a.pt")
    fresh = model("vit-tiny12", ViTOptions(cpe=False, class_tokens=2))
    before = fresh.state_dict()["student.prefix"].clone()
    lines = started(fresh, str(tmp_path / "a.pt"))
    assert "16x16 to 8x8" in lines[0]
    assert lines[1] == "not taken, and fresh: weights of the trunk: prefix"
    assert torch.equal(fresh.state_dict()["student.prefix"], before)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("vit-tiny16", "not the weights of this architecture: missing: stem.layers"),
        ("vit-s16", "4 attention heads, and vit-s16 has 6"),
        ("e-radio-tiny", "not the weights of this architecture"),
    ],
)
def test_another_architecture_is_one_error(student: str, message: str, tmp_path: Path) -> None:
    model("vit-tiny12").save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        warm_start(model(student), str(tmp_path / "a.pt"), print)


def test_vits_of_another_kind_are_one_error(tmp_path: Path) -> None:
    clip = save_timm(tmp_path / "c.safetensors", "vit_xsmall_patch16_clip_224", num_classes=0)
    with pytest.raises(CheckpointError, match="no plain ViT as ours"):
        warm_start(model("vit-s16"), clip, print)
    small = save_timm(tmp_path / "s.safetensors", "vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match="3 attention heads, and vit-s16 has 6"):
        warm_start(model("vit-s16"), small, print)
    with pytest.raises(CheckpointError, match="cannot be e-radio-tiny, which is another network"):
        warm_start(model("e-radio-tiny"), small, print)
    with pytest.raises(CheckpointError, match="name both with the same tag"):
        warm_start(model("timm:deit_tiny_patch16_224"), small, print)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("scenes:clip", ConfigError, "a student cannot start from it"),
        ("arch:vit-tiny12", CheckpointError, "is an architecture and names no weights; give a checkpoint"),
        ("vit-tiny12", CheckpointError, "is an architecture and names no weights; give a checkpoint"),
        ("none.pt", CheckpointError, "none.pt"),
        (
            "timm:vit_tiny_patch16_224",
            CheckpointError,
            "names no weights; give a checkpoint, timm:NAME@FILE",
        ),
        ("tim:x", ConfigError, "tim"),
    ],
)
def test_what_names_no_weights_is_an_error_before_anything_is_loaded(
    spec: str,
    error: type[Exception],
    message: str,
    config: TrainConfig,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.trainer.load_teachers", None)
    with pytest.raises(error, match=message):
        start(config, init=spec)


def test_a_run_starts_there_and_resumes_only_with_the_same_weights(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    files = {}
    for seed in (1, 2):
        run = start(config, steps=5, seed=seed, out=tmp_path / f"first{seed}")
        run.train()
        files[seed] = tmp_path / f"first{seed}" / "ckpt.pt"
    warm = replace(config, init=str(files[1]), steps=10, seed=3)
    run = start(warm, ema=0.9)
    for name, weight in load_backbone(str(files[1])).state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(run.model.state_dict()[name], weight)
    assert torch.equal(
        run.average.tensors["student.norm.weight"], run.model.state_dict()["student.norm.weight"]
    )  # type: ignore[union-attr]
    assert run.model.metadata["init"]["model"] == str(files[1])
    start(warm).train()
    moved = tmp_path / "moved.pt"
    moved.write_bytes(files[1].read_bytes())
    assert start(warm, init=str(moved)).step == 10
    with pytest.raises(CheckpointError, match=r"other settings \(init was "):
        start(warm, init=str(files[2]))
    with pytest.raises(CheckpointError, match=r"other settings \(init was .* and is null"):
        start(warm, init=None)
    assert losses_of(config.out)[0] < losses_of(tmp_path / "first1")[0]


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_heads_that_are_taken_predict_normalised_tokens(
    config: TrainConfig, start: Start, tmp_path: Path, spectral: bool, ema: float
) -> None:
    """Before the first step, what is folded again is what the run started from."""
    start(config, steps=3, out=tmp_path / "first").train()
    file = tmp_path / "first" / "ckpt.pt"
    normalised = replace(config, normalise=NormaliseConfig(kind="phi-s", steps=3), ema=ema, spectral=spectral)
    run = start(normalised, init=str(file), optim=replace(config.optim, lr=0.0), steps=1, log_every=1)
    run.train()
    wanted = load(file).tensors
    for name in ("ckpt.pt", *(["ckpt-ema.pt"] if ema else [])):
        found = load(config.out / name).tensors
        for key in wanted:
            assert torch.allclose(found[key], wanted[key], atol=1e-5), key
    trained_as = run.reparametrisation.fold(run.model.state_dict())["adaptors.clip.spatial.layers.3.weight"]
    assert not torch.allclose(trained_as, wanted["adaptors.clip.spatial.layers.3.weight"], atol=1e-2)
