from __future__ import annotations

from pathlib import Path
from typing import Any, final

import pytest
import torch

from evals.sam_dropin.encoder import make_drop_in
from evals.sam_dropin.masks import resize_and_pad
from radio.errors import CheckpointError, ConfigError, SizeError
from radio.hub import load_backbone, load_teacher
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.ops import resize_tokens
from radio.teachers import families
from radio.teachers.sam import new_released_sam
from radio.teachers.scenes import scenes_sam
from tests.radio.teachers.releases import mlp2, save_pickled, teacher, trunk


def student(arch: str = "vit-tiny12", width: int = 96, **entry: Any) -> RadioModel:
    """A model whose metadata says that it learned from a SAM."""
    adaptors = (AdaptorConfig(name="sam", summary_dim=width, token_dim=width),)
    teachers = [{"name": "sam", "model": "scenes:sam", "fingerprint": "", **entry}]
    return build(ModelConfig(student=arch, adaptors=adaptors), 0, {"teachers": teachers}).eval()


def test_the_students_tokens_go_through_sams_own_neck() -> None:
    model = student()
    drop_in = make_drop_in(model, None, 96, 0)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = drop_in.embed(images)
        features = model.adapt("sam", model(images), (14, 14))
        expected = scenes_sam().image_encoder.neck(features.tokens.transpose(1, 2).unflatten(2, (14, 14)))
    assert found.shape == (2, 64, 14, 14)
    torch.testing.assert_close(found, expected)


def test_a_sams_own_tokens_are_not_resampled() -> None:
    """A SAM's own tokens lie on its grid already, and stay as they are."""
    model = load_teacher("scenes:sam")
    drop_in = make_drop_in(model, None, None, 0)
    images = torch.rand(1, 3, 112, 112)
    tokens = model(images).tokens
    assert torch.equal(resize_tokens(tokens, (14, 14), drop_in.head.grid), tokens)


def test_a_sam_itself_gives_what_its_whole_encoder_gives() -> None:
    """Preprocessing included: the predictor's pixels through SAM, and ours through the drop-in."""
    sam, drop_in = scenes_sam(), make_drop_in(load_backbone("scenes:sam"), None, None, 0)
    image = torch.randint(0, 255, (3, 70, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    with torch.no_grad():
        ours = drop_in.embed(resize_and_pad(image, drop_in.side, drop_in.head.mean)[None])
    torch.testing.assert_close(ours, predictor.features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arch", "window", "size", "side"),
    [
        ("vit-tiny12", None, None, 96),  # 8 of the 9 tokens that the frame of 112 px has room for
        ("vit-tiny12", None, 132, 132),
        ("vitdet-tiny12", 2, None, 96),
        ("vitdet-tiny12", 8, None, 96),
        ("e-radio-tiny", None, None, 96),
        ("e-radio-tiny", 5, 120, 120),
    ],
)
def test_sides_of_students(arch: str, window: int | None, size: int | None, side: int) -> None:
    model = student(arch)
    chosen = model if window is None else model.with_window(window)
    assert make_drop_in(chosen, None, size, 0).side == side
    assert make_drop_in(student(arch, student_resolution=144), None, size, 0).side == (size or 144)


def test_the_papers_sides_of_untrained_giants() -> None:
    """Patch 14 sees 1008 px, where windows of 8, 9 and 18 fit; patch 16 sees 1024."""
    with torch.device("meta"):
        giants = {arch: build(ModelConfig(student=arch), 0) for arch in ("vitdet-b14", "vitdet-b16")}
    for window in (8, 9, 18):
        assert make_drop_in(giants["vitdet-b14"].with_window(window), None, None, 0).side == 1008
    found = make_drop_in(giants["vitdet-b16"].with_window(8), None, None, 0)
    assert found.side == 1024
    assert "untrained: encoder, adaptor and decoder" in found.notes[0]
    with pytest.raises(
        SizeError,
        match="1008x1008 px with windows of 7: they do not divide its 72x72 tokens; the nearest windows that "
        "do are 6 and 8, the nearest size for 7 is --size 980",
    ):
        make_drop_in(giants["vitdet-b14"].with_window(7), None, None, 0)
    with pytest.raises(SizeError, match=r"cannot take 1000x1000 px; the nearest size .* is 994x994"):
        make_drop_in(giants["vitdet-b14"].with_window(1), None, 1000, 0)


def test_the_sides_of_a_hybrid_that_chooses_its_windows_by_the_size() -> None:
    with torch.device("meta"):
        hybrid = build(ModelConfig(student="e-radio-xt"), 0)
    for window in (None, 8, 16):
        assert make_drop_in(hybrid.with_window(window), None, None, 0).side == 1024
    for window, size, message in (
        (None, 1000, "cannot take 1000x1000 px; the nearest size that it can is 992x992"),
        (
            12,
            None,
            "1024x1024 px with windows of 12: they do not divide its 32x32 tokens;",
        ),
        (7, 1024, "the nearest windows that do are 8 and 4, the nearest size for 7 is --size 1120"),
    ):
        with pytest.raises(SizeError, match=message):
            make_drop_in(hybrid.with_window(window), None, size, 0)


def test_models_without_a_sam_are_told_what_has_one() -> None:
    with pytest.raises(
        ConfigError, match=r"scenes:clip learned from no teacher; the drop-in needs a student"
    ):
        make_drop_in(load_backbone("scenes:clip"), None, None, 0)
    with pytest.raises(ConfigError, match="learned from scenes:clip; the drop-in needs"):
        make_drop_in(student(model="scenes:clip"), None, None, 0)


def test_heads_that_do_not_belong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives 50 channels, and the neck of scenes:sam takes 96"):
        make_drop_in(student(width=50), None, None, 0)
    with pytest.raises(
        CheckpointError, match=r"gone\.pth: no such weights file; if the file has moved, .*--sam-ch"
    ):
        make_drop_in(student(model="sam:vit_h@gone.pth"), None, None, 0)
    with pytest.raises(ConfigError, match="brings its own decoder"):
        make_drop_in(load_backbone("scenes:sam"), tmp_path / "sam.pth", None, 0)


def released(path: Path, width: int = 768) -> Path:
    """A file with the parts of a released SAM that a drop-in reads."""
    sam = new_released_sam(width)
    parts = ("image_encoder.neck.", "prompt_encoder.", "mask_decoder.")
    torch.save({name: value for name, value in sam.state_dict().items() if name.startswith(parts)}, path)
    return path


def test_a_checkpoint_counts_for_students_of_the_shipped_sam_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such weights file"):
        make_drop_in(student(), tmp_path / "gone.pth", None, 0)
    file = released(tmp_path / "sam.pth")
    with pytest.raises(ConfigError, match="gives 96 channels, and the neck of sam:vit_b takes 768"):
        make_drop_in(student(), file, None, 0)
    drop_in = make_drop_in(student(width=768), file, None, 0)
    assert (drop_in.head.name, drop_in.adaptor) == ("sam:vit_b", "sam")


@final
class Stranger:
    """Another package's SAM: the shipped one behind another family's name."""

    def __init__(self, sam: Any) -> None:
        self._encoder = load_teacher("scenes:sam")
        self.name = "strange:one"
        self.sam = sam

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


@pytest.fixture
def strange(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A family of teachers; what its members offer as their SAM."""
    offers: dict[str, Any] = {}
    family = lambda name, file: Stranger(offers.get("sam" if name == "one" else name))  # noqa: E731
    monkeypatch.setattr(families, "_entries", {**families._entries, "strange": family})
    return offers


def test_a_student_of_another_packages_sam(strange: dict[str, Any], tmp_path: Path) -> None:
    model = student(model="strange:one")
    with pytest.raises(
        ConfigError,
        match=r"learned from strange:one, whose decoder cannot be loaded: strange:one brings no mask "
        "decoder; if it is a SAM, name its released file with --sam-checkpoint",
    ):
        make_drop_in(model, None, None, 0)
    strange["sam"] = scenes_sam()
    offered = make_drop_in(model, None, None, 0)
    assert (offered.head.name, offered.adaptor) == ("strange:one", "sam")
    assert offered.head.fingerprint == make_drop_in(student(), None, None, 0).head.fingerprint
    named = make_drop_in(student(width=768, model="strange:one"), released(tmp_path / "sam.pth"), None, 0)
    assert named.head.name == "sam:vit_b"


def test_another_packages_sam_is_the_one_that_brings_it(strange: dict[str, Any]) -> None:
    """Of two teachers of other packages, the attribute says which is the SAM."""
    adaptors = tuple(AdaptorConfig(name=name, summary_dim=96, token_dim=96) for name in ("a", "b"))
    teachers = [{"name": name, "model": f"strange:{name}", "fingerprint": ""} for name in ("a", "b")]
    model = build(ModelConfig(student="vit-tiny12", adaptors=adaptors), 0, {"teachers": teachers})
    with pytest.raises(ConfigError, match="name the teacher that is the SAM with --teacher NAME"):
        make_drop_in(model, None, None, 0)
    strange["b"] = scenes_sam()
    assert make_drop_in(model, None, None, 0).adaptor == "b"


def test_a_sam_of_any_name_is_recognised_by_what_it_brings(strange: dict[str, Any]) -> None:
    strange["sam"] = scenes_sam()
    model: Any = load_teacher("strange:one")
    model.name = "plain"
    drop_in = make_drop_in(model, None, None, 0)
    assert (drop_in.head.name, drop_in.adaptor) == ("plain", None)


def test_another_packages_sam_itself(strange: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="strange:one brings no mask decoder"):
        make_drop_in(load_teacher("strange:one"), None, None, 0)
    strange["sam"] = scenes_sam()
    assert make_drop_in(load_teacher("strange:one"), None, None, 0).adaptor is None


def test_the_teacher_can_be_named() -> None:
    adaptors = tuple(AdaptorConfig(name=name, summary_dim=96, token_dim=96) for name in ("a", "b"))
    teachers = [{"name": name, "model": "scenes:sam", "fingerprint": ""} for name in ("a", "b")]
    model = build(ModelConfig(student="vit-tiny12", adaptors=adaptors), 0, {"teachers": teachers})
    assert make_drop_in(model, None, None, 0).adaptor == "a"
    assert make_drop_in(model, None, None, 0, "b").adaptor == "b"
    with pytest.raises(ConfigError, match="has no teacher 'c' in its metadata; it has a, b"):
        make_drop_in(model, None, None, 0, "c")
    with pytest.raises(ConfigError, match="scenes:sam has no teachers in its metadata; leave --teacher out"):
        make_drop_in(load_backbone("scenes:sam"), None, None, 0, "a")


@pytest.mark.parametrize("teachers", ["x", [1], [{}], [{"name": "sam", "model": 5}]])
def test_a_cards_teachers_of_another_shape(teachers: Any) -> None:
    model = build(ModelConfig(student="vit-tiny12"), 0, {"teachers": teachers})
    with pytest.raises(CheckpointError, match="vit-tiny12: the teachers in its metadata"):
        make_drop_in(model, None, None, 0)


@pytest.mark.parametrize(("sides", "side"), [(144, 144), ([144], 144), ([144, 144], 144), ([144, 96], 96)])
def test_the_side_that_a_card_names(sides: Any, side: int) -> None:
    assert make_drop_in(student(student_resolution=sides), None, None, 0).side == side


def test_the_sam_is_found_behind_teachers_whose_files_are_gone() -> None:
    """The choice looks at the attribute on the meta device, and reads no file."""
    adaptors = tuple(AdaptorConfig(name=name, summary_dim=96, token_dim=96) for name in ("a", "b"))
    models = {"a": "dinov2:vitb14@gone.pth", "b": "scenes:sam"}
    teachers = [{"name": name, "model": model, "fingerprint": ""} for name, model in models.items()]
    model = build(ModelConfig(student="vit-tiny12", adaptors=adaptors), 0, {"teachers": teachers})
    assert make_drop_in(model, None, None, 0).adaptor == "b"


def test_a_release_is_dropped_in_through_its_sam_adaptor(tmp_path: Path) -> None:
    heads = {"0": (mlp2(9, 1), mlp2(9, 2)), "1": (mlp2(96, 3), mlp2(96, 4))}
    for kind in ("scenes", "other"):
        teachers = (teacher("clip", type="x"), teacher("sam", type=kind, model="sam", use_summary=False))
        path = save_pickled(tmp_path / f"{kind}.pth.tar", trunk(), teachers, heads)
        model = load_backbone(f"radio:{path}")
        if kind == "scenes":
            drop_in = make_drop_in(model, None, None, 0)
            assert (drop_in.side, drop_in.adaptor, drop_in.head.name) == (112, "sam", "scenes:sam")
            assert drop_in.embed(torch.rand(1, 3, 112, 112)).shape == (1, 64, 14, 14)
            continue
        with pytest.raises(ConfigError, match=r"learned from clip, sam; .* --teacher NAME"):
            make_drop_in(model, None, None, 0)
        with pytest.raises(ConfigError, match=r"which SAM the teacher sam is; .* with --sam-checkpoint"):
            make_drop_in(model, None, None, 0, teacher="sam")
