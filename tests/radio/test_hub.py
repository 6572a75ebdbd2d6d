"""Model specs: every form there is, and every way to get one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import radio
from radio import hub
from radio.errors import CheckpointError, ConfigError, RadioError, SizeError
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.students.vit import ViTDetOptions, ViTOptions
from radio.teachers import families
from radio.types import Features

IMAGES = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


class Plain:
    """A teacher without windows that remembers how it was asked for."""

    def __init__(self, name: str, file: Path | None) -> None:
        self.name, self.file = name, file
        self.text = self.with_window = None

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.mean((2, 3)), images.flatten(2).transpose(1, 2), tuple(images.shape[-2:]))


@pytest.fixture(autouse=True)
def _family(monkeypatch):
    monkeypatch.setitem(families._entries, "plain", Plain)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "demo" / "ckpt.pt"
    heads = (AdaptorConfig(name="clip", summary_dim=5, token_dim=7),)
    options = ViTDetOptions(window=2)
    build(ModelConfig(student="vitdet-tiny12", options=options, adaptors=heads), 3).save(path)
    return path


@pytest.mark.parametrize("text", ["arch:vit-tiny12", "vit-tiny12"])
def test_an_architecture_untrained(text):
    model = hub.load_backbone(text, random_init=True, seed=4)
    assert isinstance(model, RadioModel) and not model.training and model.name == "vit-tiny12"
    assert model.fingerprint == build(ModelConfig(student="vit-tiny12"), 4).fingerprint
    assert hub.load_backbone("arch:vit-tiny12", seed=5).fingerprint != model.fingerprint


def test_a_checkpoint_and_its_untrained_self(saved):
    model = hub.load_backbone(str(saved))
    assert isinstance(model, RadioModel) and model.name == "demo" and not model.training
    assert model.adapt("clip", model(IMAGES)).summary.shape == (1, 5)
    floor = hub.load_backbone(str(saved), random_init=True, seed=3)
    assert floor.name == "demo-untrained" and floor.fingerprint == model.fingerprint  # the same seed
    assert hub.load_backbone(str(saved), random_init=True).fingerprint != model.fingerprint


def test_a_checkpoint_in_a_folder_with_a_colon(saved, tmp_path):
    odd = tmp_path / "lr:3" / "ckpt.pt"
    odd.parent.mkdir()
    odd.write_bytes(saved.read_bytes())
    assert hub.load_backbone(str(odd)).name == "lr:3"


def test_a_teacher_with_and_without_a_file(tmp_path):
    for load in (hub.load_backbone, hub.load_teacher):
        assert load("plain:small").file is None
        named = load(f"plain:small@{tmp_path}/a@b:c.pth")
        assert (named.name, named.file) == ("small", tmp_path / "a@b:c.pth")


def test_the_built_in_families_are_there_and_want_their_files(tmp_path):
    assert {"openclip", "dinov2", "sam", "pip", "scenes"} <= set(families)
    for text in ("dinov2:vits14", "sam:vit_b"):
        with pytest.raises(CheckpointError, match=f"{text}@FILE"):
            hub.load_backbone(text)
        with pytest.raises(CheckpointError, match="no such weights file"):
            hub.load_backbone(f"{text}@{tmp_path}/absent.pth")


def test_a_window_is_chosen_per_use(saved):
    usual, wide = hub.load_backbone(str(saved)), hub.load_backbone(str(saved), window=8)
    assert not torch.equal(usual(IMAGES).tokens, wide(IMAGES).tokens)
    assert wide.nearest_size(200, 100) == (192, 96)
    with pytest.raises(SizeError, match=r"plain:small has no attention windows to choose; use a vitdet"):
        hub.load_backbone("plain:small", window=8)


@torch.inference_mode()
def test_global_attention_is_that_of_a_plain_vit_with_the_same_weights(saved):
    windowed = hub.load_backbone(str(saved), window="global")
    plain = build(ModelConfig(student="vit-tiny12", options=ViTOptions()), 0).eval()
    plain.student.load_state_dict(windowed.student.state_dict(), strict=True)
    for found, wanted in zip(windowed(IMAGES), plain(IMAGES), strict=True):
        assert found == wanted if isinstance(found, tuple) else torch.equal(found, wanted)
    assert windowed.window is None and windowed.nearest_size(100, 35) == (96, 36)
    assert not torch.equal(hub.load_backbone(str(saved))(IMAGES).tokens, windowed(IMAGES).tokens)


@pytest.mark.parametrize("text", ["e-radio-tiny", "e-radio-tiny-noup", "timm:test_vit", "plain:small"])
def test_a_model_that_has_no_global_attention_says_so(text):
    with pytest.raises(SizeError, match=f"{text} has no global attention to choose; use a vitdet student"):
        hub.load_backbone(text, random_init=text != "plain:small", window="global")


@pytest.mark.parametrize(
    ("text", "random_init", "kind", "message"),
    [
        ("vit-tiny12", False, ConfigError, "an architecture and has no weights; .*--random-init"),
        ("vit-tinny12", True, CheckpointError, r"'vit-tinny12' is no file .*did you mean vit-tiny12"),
        (
            "qqq",
            False,
            CheckpointError,
            r"'qqq' is no file .*; known architectures: .*, vit-b14,",
        ),
        ("arch:vit-tinny12", False, ConfigError, r"unknown student 'vit-tinny12'; did you mean vit-tiny12"),
        ("arch:", False, ConfigError, "'arch:' is not a whole model spec; wanted arch:NAME"),
        ("arch:vit-tiny12@w.pt", False, ConfigError, "takes no file"),
        ("plian:small", False, ConfigError, r"unknown teacher 'plian'; did you mean plain"),
        ("plain:", False, ConfigError, "'plain:' is not a whole model spec"),
        ("plain:small@", False, ConfigError, "'plain:small@' is not a whole model spec"),
        ("plain:small", True, ConfigError, "teachers are not scored untrained"),
        ("runs/none/ckpt.pt", False, CheckpointError, r"runs/none/ckpt\.pt: no such checkpoint file"),
        ("none.safetensors", True, CheckpointError, r"none\.safetensors: no such checkpoint file"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(text, random_init, kind, message):
    with pytest.raises(kind, match=message):
        hub.load_backbone(text, random_init=random_init)


def test_a_text_file_as_a_checkpoint_is_an_error(tmp_path):
    for name in ("ckpt.pt", "notes.txt"):
        (tmp_path / name).write_text("these are notes\n")
        with pytest.raises(CheckpointError, match=name):
            hub.load_backbone(str(tmp_path / name))


def test_what_is_no_teacher_is_an_error():
    with pytest.raises(ConfigError, match=r"'clip' is not a teacher; wanted .*families: .*plain"):
        hub.load_teacher("clip")
    with pytest.raises(ConfigError, match="is an untrained student; a teacher comes from"):
        hub.load_teacher("arch:vit-tiny12")


def test_the_package_offers_its_names_lazily():
    assert radio.load_backbone is hub.load_backbone and radio.RadioModel is RadioModel
    assert radio.RadioError is RadioError and radio.Features is Features
    assert set(radio.__all__) == {"Backbone", "Features", "RadioError", "RadioModel", "load_backbone"}
    with pytest.raises(AttributeError, match="no attribute 'load_backbon'"):
        _ = radio.load_backbon


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("dinov2:vitg14@no/such.pth", 1_136_480_768 - 1536),  # the release less its mask token
        ("sam:vit_h@no/such.pth", 637_026_048),  # segment-anything's image encoder
        ("openclip:ViT-B-32@no/such.pt", 151_277_313),  # open_clip's own table
        ("pip:efficientnet-lite0", 4_652_008),  # timm's
        ("pip:dinov2-arch-vits14", 22_056_576 - 384),
    ],
)
def test_a_teachers_outline_needs_no_file(text: str, count: int):
    teacher = hub.load_teacher(text, meta=True)
    weights = list(teacher.parameters())
    assert sum(weight.numel() for weight in weights) == count
    assert {weight.device.type for weight in weights} == {"meta"}
    assert teacher.name == text.partition("@")[0]
    found = teacher(torch.empty(2, 3, *teacher.native_size, device="meta"))
    assert found.summary.shape == (2, teacher.summary_dim)
    assert found.tokens.shape == (2, found.grid[0] * found.grid[1], teacher.token_dim)


@pytest.mark.parametrize("name", ["clip", "dense", "sam"])
def test_the_outline_of_a_scenes_teacher_is_that_teacher(name: str):
    outline, real = hub.load_teacher(f"scenes:{name}", meta=True), hub.load_teacher(f"scenes:{name}")
    assert outline.native_size == real.native_size
    shapes = [[(n, p.shape) for n, p in teacher.named_parameters()] for teacher in (outline, real)]
    assert shapes[0] == shapes[1]
    assert next(outline.parameters()).device.type == "meta"


def test_a_family_without_outlines_is_loaded(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(Plain, "to", lambda self, device, dtype: moved.append(device) or self, raising=False)
    assert hub.load_teacher(f"plain:x@{tmp_path}", meta=True).file == tmp_path
    assert moved == [torch.device("meta")]


@pytest.mark.parametrize(
    "text", ["dinov2:vitg15", "sam:vit_x", "openclip:ViT-B-33", "scenes:sammy", "pip:dino"]
)
def test_outlines_of_unknown_members(text: str):
    with pytest.raises(ConfigError, match="unknown"):
        hub.load_teacher(text, meta=True)
