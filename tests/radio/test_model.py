"""RadioModel: a student, its adaptors, and the file both are saved as."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from radio import checkpoint
from radio.config import to_plain
from radio.errors import CheckpointError, ConfigError
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build, load, load_untrained
from radio.students import students
from radio.students.vit import ViTDetOptions
from radio.types import Backbone, Features, Student

CLIP = AdaptorConfig(name="clip", summary_dim=5, token_dim=7, slot=0)
SAM = AdaptorConfig(name="sam", summary_dim=6, token_dim=6, slot=1, resample="after")
CONFIG = ModelConfig(
    student="vitdet-tiny12",
    options=ViTDetOptions(class_tokens=2, registers=1, window=2),
    adaptors=(CLIP, SAM),
)


def _images(batch: int = 2, side: int = 48) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def _equal(found: Features, wanted: Features) -> None:
    assert torch.equal(found.summary, wanted.summary) and torch.equal(found.tokens, wanted.tokens)
    assert found.grid == wanted.grid


@pytest.fixture
def foreign(monkeypatch) -> str:
    """The name of a student that is neither windowed nor of the ViT family."""

    class Pooled(nn.Module):
        name, fingerprint, native_size, summary_dim, token_dim = "pooled", "0", (32, 32), 3, 3

        def nearest_size(self, height: int, width: int) -> tuple[int, int]:
            return height, width

        def sample_crops(self, batch: int, generator: torch.Generator) -> None:
            return None

        def forward(self, images: torch.Tensor, crops: None = None) -> Features:
            return Features(images.mean((2, 3)), images.flatten(2).transpose(1, 2), tuple(images.shape[-2:]))

    monkeypatch.setitem(students._entries, "pooled", lambda options: Pooled())
    return "pooled"


def test_a_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (build(CONFIG, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["student.prefix"], other["student.prefix"])


def test_a_seed_leaves_every_gpus_generator_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it seeded the GPUs"))
    assert torch.equal(build(CONFIG, 3).student.prefix, build(CONFIG, 3).student.prefix)


def test_it_is_a_backbone_whatever_the_student(foreign):
    for model in (build(CONFIG, 0), build(ModelConfig(student=foreign), 0)):
        assert isinstance(model, Backbone) and isinstance(model, Student)
    model = build(CONFIG, 0)
    assert (model.summary_dim, model.token_dim, model.native_size) == (256, 128, (96, 96))
    assert model.nearest_size(100, 50) == (96, 48) and model.name == "vitdet-tiny12"


def test_features_and_what_the_adaptors_make_of_them():
    model, images = build(CONFIG, 0).eval(), _images()
    features = model(images)
    assert features.summary.shape == (2, 256) and features.tokens.shape == (2, 16, 128)
    _equal(features, model.student(images))
    clip, sam = model.adapt("clip", features), model.adapt("sam", features, (3, 5))
    assert clip.summary.shape == (2, 5) and clip.tokens.shape == (2, 16, 7) and clip.grid == (4, 4)
    assert sam.summary.shape == (2, 6) and sam.tokens.shape == (2, 15, 6) and sam.grid == (3, 5)
    crops = model.sample_crops(2, torch.Generator().manual_seed(0))
    _equal(model(images, crops), model.student(images, crops))
    assert not torch.equal(model(images, crops).tokens, features.tokens)


def test_an_adaptor_that_is_not_there_is_an_error():
    model = build(CONFIG, 0)
    with pytest.raises(ConfigError, match=r"vitdet-tiny12 has no adaptor 'clop'; did you mean clip\?"):
        model.adapt("clop", model(_images()))
    with pytest.raises(ConfigError, match="no adaptor 'dino'; it has clip, sam"):
        model.adapt("dino", model(_images()))
    bare = build(ModelConfig(student="vit-tiny12"), 0)
    with pytest.raises(ConfigError, match="no adaptor 'clip'; it has none"):
        bare.adapt("clip", bare(_images()))


def test_adaptors_that_cannot_stand_side_by_side_are_errors():
    def of(*names: str) -> ModelConfig:
        heads = tuple(AdaptorConfig(name=name, summary_dim=5, token_dim=7) for name in names)
        return ModelConfig(student="vit-tiny12", adaptors=heads)

    with pytest.raises(ConfigError, match="two adaptors are named 'clip'"):
        build(of("clip", "sam", "clip"), 0)
    for name in ("a.b", "keys", ""):
        with pytest.raises(ConfigError, match=f"an adaptor cannot be named '{name}'"):
            build(of(name), 0)


def test_an_unknown_student_and_one_that_is_no_module_are_errors(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown student 'vit-tiny'; did you mean vit-tiny1"):
        build(ModelConfig(student="vit-tiny"), 0)
    monkeypatch.setitem(students._entries, "odd", lambda options: object())
    with pytest.raises(ConfigError, match="student 'odd' is not a torch module"):
        build(ModelConfig(student="odd"), 0)


def test_with_window_shares_everything_and_leaves_the_original(foreign):
    model, images = build(CONFIG, 0).eval(), _images()
    before = model(images)
    twin = model.with_window(4)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    _equal(model(images), before)
    assert not torch.equal(twin(images).tokens, before.tokens)
    assert twin.fingerprint != model.fingerprint
    twin.adapt("clip", twin(images)).tokens.square().mean().backward()
    assert (
        model.student.prefix.grad is not None
        and model.adaptors["clip"].spatial.layers[0].weight.grad is not None
    )
    assert build(ModelConfig(student=foreign), 0).with_window is None


def test_the_fingerprint_covers_weights_adaptors_and_shape_and_nothing_else():
    model = build(CONFIG, 0)
    assert build(CONFIG, 0, {"resolution": 48}, "other").fingerprint == model.fingerprint
    assert build(CONFIG, 1).fingerprint != model.fingerprint
    after = ModelConfig(student=CONFIG.student, options=CONFIG.options, adaptors=(SAM, CLIP))
    assert build(after, 0).fingerprint != model.fingerprint
    before = model.fingerprint
    with torch.no_grad():
        model.adaptors["sam"].spatial.layers[3].bias[0] += 1
    assert model.fingerprint != before


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, ending):
    path = tmp_path / "demo" / f"ckpt{ending}"
    model = build(CONFIG, 5, {"resolution": 64, "teachers": [{"name": "clip"}]}).eval()
    sha = model.save(path)
    again = load(path)
    assert checkpoint.load(path).sha256 == sha
    assert again.config == CONFIG and not again.training and again.name == "demo"
    assert (
        again.metadata["teachers"] == [{"name": "clip"}]
        and again.native_size == (72, 72) == model.native_size
    )
    assert again.fingerprint == model.fingerprint
    found, wanted = again(_images()), model(_images())
    _equal(found, wanted)
    _equal(again.adapt("sam", found, (3, 3)), model.adapt("sam", wanted, (3, 3)))
    assert again.save(tmp_path / f"twice{ending}") == sha
    assert (tmp_path / f"twice{ending}").read_bytes() == path.read_bytes()


def test_the_untrained_self_has_the_shape_and_other_weights(tmp_path):
    path = tmp_path / "demo" / "ckpt.pt"
    model = build(CONFIG, 5, {"resolution": 64, "teachers": []})
    model.save(path)
    untrained = load_untrained(path, 9)
    assert (
        untrained.config == CONFIG and untrained.native_size == model.native_size and not untrained.training
    )
    assert untrained.name == "demo-untrained"
    assert untrained.fingerprint == build(CONFIG, 9).fingerprint != model.fingerprint


def test_a_checkpoint_with_the_options_of_all_families_is_read(tmp_path):
    """As they were written when the families shared one class of options."""
    model = build(CONFIG, 0)
    options = {**to_plain(CONFIG.options), "upsample": None, "image_size": None}
    metadata = {"model": {**to_plain(CONFIG), "options": options}}
    checkpoint.save(tmp_path / "ckpt.pt", model.state_dict(), metadata)
    assert load(tmp_path / "ckpt.pt").config == CONFIG
    options["image_size"] = 96
    checkpoint.save(tmp_path / "ckpt.pt", model.state_dict(), metadata)
    with pytest.raises(ConfigError, match=r"unknown setting '.*ckpt.pt: model\.options\.image_size'"):
        load(tmp_path / "ckpt.pt")


def test_checkpoints_that_hold_no_model_of_ours_are_errors(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, {"a": torch.zeros(1)}, {"kind": "features"})
    with pytest.raises(CheckpointError, match="its metadata describes no model"):
        load(path)
    plain = to_plain(CONFIG)
    model = build(CONFIG, 0)
    checkpoint.save(path, model.state_dict(), {"model": {**plain, "student": "vit-tiny99"}})
    with pytest.raises(ConfigError, match="unknown student 'vit-tiny99'"):
        load(path)
    checkpoint.save(path, model.state_dict(), {"model": {**plain, "studen": 1}})
    with pytest.raises(
        ConfigError, match=r"unknown setting '.*ckpt\.pt: model\.studen'; did you mean student\?"
    ):
        load(path)
    less = {name: tensor for name, tensor in model.state_dict().items() if name != "student.norm.bias"}
    checkpoint.save(path, less, {"model": plain})
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: these are not .*: missing: student\.norm\.bias$"):
        load(path)
    assert json.loads(json.dumps(plain)) == plain


def test_half_precision_runs_and_is_saved_as_such(tmp_path):
    model = build(CONFIG, 0).to(torch.device("cpu"), torch.bfloat16).eval()
    assert isinstance(model, RadioModel) and model(_images()).tokens.dtype == torch.bfloat16
    model.save(tmp_path / "half.pt")
    assert all(t.dtype == torch.bfloat16 for t in checkpoint.load(tmp_path / "half.pt").tensors.values())


def test_a_student_that_lacks_a_part_is_told_which(monkeypatch):
    class Partial(nn.Linear):
        name, fingerprint, summary_dim, token_dim = "partial", "0", 2, 2

        def nearest_size(self, height, width):
            return height, width

    monkeypatch.setitem(students._entries, "partial", lambda options: Partial(2, 2))
    with pytest.raises(
        ConfigError, match="student 'partial' has no native_size, no sample_crops; make it a whole"
    ):
        RadioModel(ModelConfig(student="partial"))
    Partial.sample_crops, Partial.native_size = None, "8x8"
    with pytest.raises(ConfigError, match="'partial': its native_size is '8x8'; wanted"):
        RadioModel(ModelConfig(student="partial"))
