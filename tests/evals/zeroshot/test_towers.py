from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.zeroshot.texts import find_text_tower
from radio.errors import CheckpointError, ConfigError
from radio.hub import load_backbone, load_teacher
from radio.model import AdaptorConfig, ModelConfig, build
from tests.radio.teachers.releases import mlp2, save_pickled, teacher, trunk

TEACHERS = ("dense", "clip")


def student(tmp_path: Path, **changes: Any) -> Path:
    """A checkpoint that says that it learned from two scenes teachers."""
    entries = [
        {"name": name, "model": f"scenes:{name}", "fingerprint": load_teacher(f"scenes:{name}").fingerprint}
        for name in TEACHERS
    ]
    entries[1] |= changes
    adaptors = tuple(AdaptorConfig(name=name, summary_dim=128, token_dim=128) for name in TEACHERS)
    path = tmp_path / "ckpt.pt"
    build(ModelConfig(student="vit-tiny12", adaptors=adaptors), 0, {"teachers": entries}).save(path)
    return path


def test_a_teachers_own_tower() -> None:
    clip = load_teacher("scenes:clip")
    side = find_text_tower(clip)
    assert (side.teacher, side.head) == ("scenes:clip", None)
    assert side.tower is clip.text


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("wanted", [None, "clip", "scenes:clip"])
def test_a_student_is_read_with_its_teachers(tmp_path: Path, random_init: bool, wanted: str | None) -> None:
    side = find_text_tower(load_backbone(str(student(tmp_path)), random_init=random_init), wanted)
    clip = load_teacher("scenes:clip").text
    assert (side.teacher, side.head) == ("scenes:clip", "clip")
    assert clip is not None and side.tower.fingerprint == clip.fingerprint


def test_models_without_a_text_tower_are_told_who_has_one() -> None:
    for model in (load_teacher("scenes:sam"), load_backbone("arch:vit-tiny12")):
        with pytest.raises(ConfigError, match="zero-shot needs scenes:clip, openclip:NAME@FILE, hf:FOLDER"):
            find_text_tower(model)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("dense", "learned from scenes:dense: none of them has a text tower"),
        ("clop", "has no teacher 'clop'; did you mean clip"),
        ("scenes:sam", "scenes:sam has no text tower"),
    ],
)
def test_a_tower_that_is_not_there(tmp_path: Path, wanted: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_text_tower(load_backbone(str(student(tmp_path))), wanted)


def test_a_teacher_that_is_another_one_is_refused(tmp_path: Path) -> None:
    model = load_backbone(str(student(tmp_path, fingerprint="0" * 64)))
    with pytest.raises(ConfigError, match=r"is not the one that .* learned from"):
        find_text_tower(model)
    with pytest.raises(ConfigError, match="did not learn from scenes:clip"):
        find_text_tower(model, "scenes:clip")


def test_a_file_that_has_moved_can_be_named(tmp_path: Path) -> None:
    model = load_backbone(str(student(tmp_path, model="openclip:ViT-B-32@gone.pt")))
    with pytest.raises(
        CheckpointError, match=r"gone\.pt: no such weights file; if its file has moved, .*--text"
    ):
        find_text_tower(model, "clip")
    assert find_text_tower(model, "scenes:clip").head == "clip"


def test_a_teacher_takes_no_other_tower() -> None:
    with pytest.raises(ConfigError, match="brings its own text tower"):
        find_text_tower(load_teacher("scenes:clip"), "clip")


def test_a_release_names_no_weights_and_takes_the_tower_of_the_same_width(tmp_path: Path) -> None:
    heads = {"0": (mlp2(64, 1), mlp2(64, 2)), "1": (mlp2(128, 3), mlp2(128, 4))}
    teachers = (teacher("dino_v2", type="other"), teacher("clip", type="other"))
    model = load_backbone(f"radio:{save_pickled(tmp_path / 'r.pth.tar', trunk(), teachers, heads)}")
    head = find_text_tower(model, "scenes:clip")
    assert (head.teacher, head.head) == ("scenes:clip", "clip")
    with pytest.raises(ConfigError, match=r"learned from dino_v2, clip: .* with --text FAMILY"):
        find_text_tower(model)
    other = save_pickled(tmp_path / "o.pth.tar", trunk(), teachers[:1], {"0": heads["0"]})
    with pytest.raises(ConfigError, match="did not learn from scenes:clip"):
        find_text_tower(load_backbone(f"radio:{other}"), "scenes:clip")
