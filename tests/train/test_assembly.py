"""What a run is set up from, and the settings that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from radio.dist import Ranks
from radio.errors import CheckpointError, ConfigError, SizeError
from radio.model import RadioModel, build
from radio.students import ERadioOptions, StudentOptions
from radio.students.vit import ViTDetOptions, ViTOptions
from train.checkpoints import make_metadata
from train.config import CacheConfig, TeacherConfig, TrainConfig, run_name
from train.data.streams import open_images
from train.setup import (
    check_settings,
    choose_windows,
    gather_facts,
    load_teachers,
    model_config,
    round_resolutions,
    student_resolutions,
    teacher_sizes,
)

from .conftest import CPU, TEACHERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps: 0 is out of bounds"),
        ({"batch_size": -4}, "--batch-size: -4 is out of bounds"),
        ({"log_every": 0}, "--log-every: 0 is out of bounds"),
        ({"save_every": 0}, "--save-every: 0 is out of bounds"),
        ({"cache": CacheConfig(crops=0)}, r"--cache\.crops: 0 is out of bounds"),
        ({"cache": CacheConfig(images=0)}, r"--cache\.images: 0 is out of bounds"),
        ({"student": "vit-tiny21"}, "unknown student 'vit-tiny21'; did you mean .*vit-tiny12"),
        ({"batch_size": 5}, "a batch of 5 cannot be shared evenly by 2 ranks"),
        ({"grad_accum_steps": 0}, "--grad-accum-steps: 0 is out of bounds"),
        (
            {"grad_accum_steps": 4},
            "--grad-accum-steps 4 does not divide the 2 images of a step that a rank takes for clip",
        ),
        (
            {"teachers": (TeacherConfig(name="sam", model="tiny:sam", batch_size=0),)},
            "--teachers.0.batch-size: 0 is out of bounds",
        ),
    ],
)
def test_settings_that_cannot_be(config: TrainConfig, changes: dict[str, object], message: str) -> None:
    check_settings(config, 2)
    with pytest.raises(ConfigError, match=message):
        check_settings(replace(config, **changes), 2)  # type: ignore[arg-type]


def test_teachers_by_name(config: TrainConfig) -> None:
    teachers = load_teachers(config, CPU)
    assert list(teachers) == ["clip", "dense", "sam"]
    assert list(load_teachers(config, CPU, ("sam", "clip"))) == ["clip", "sam"]
    sizes = {"clip": {48: (50, 50)}, "dense": {48: (64, 64)}, "sam": {48: (108, 108)}}
    assert teacher_sizes(config, teachers) == sizes
    for wrong in ((), (TEACHERS[0], TEACHERS[0])):
        with pytest.raises(ConfigError, match="a run needs teachers with names of their own, got"):
            load_teachers(replace(config, teachers=wrong), CPU)
    unknown = TeacherConfig(name="clip", model="tinny:clip")
    with pytest.raises(ConfigError, match="unknown teacher 'tinny'; did you mean tiny"):
        load_teachers(replace(config, teachers=(unknown,)), CPU)


def test_only_the_weights_with_the_fingerprint_asked_for_are_taken(config: TrainConfig) -> None:
    known = load_teachers(config, CPU)["clip"].fingerprint
    for model, refused in (("tiny:clip", False), ("tiny:clip2", True)):
        teacher = TeacherConfig(name="clip", model=model, fingerprint=known)
        chosen = replace(config, teachers=(teacher,))
        if refused:
            message = f"teacher clip: tiny:clip2 has other weights than configured: .*, not {known}; bring"
            with pytest.raises(CheckpointError, match=message):
                load_teachers(chosen, CPU)
        else:
            assert load_teachers(chosen, CPU)["clip"].fingerprint == known


def test_a_teachers_resolution_is_its_native_one_or_the_settings(config: TrainConfig) -> None:
    chosen = replace(config, teachers=(replace(TEACHERS[0], resolution=80), TEACHERS[1]))
    sizes = {"clip": {48: (80, 80)}, "dense": {48: (64, 64)}}
    assert teacher_sizes(chosen, load_teachers(chosen, CPU)) == sizes


@pytest.mark.parametrize(("place", "side", "nearest"), [(0, 84, "80x80"), (2, 96, "108x108")])
def test_a_resolution_that_a_teacher_cannot_take(
    config: TrainConfig, place: int, side: int, nearest: str
) -> None:
    chosen = replace(config, teachers=(replace(TEACHERS[place], resolution=side),))
    name = TEACHERS[place].name
    message = f"teacher {name} cannot take {side}x{side} px; the nearest size that it can is {nearest}"
    with pytest.raises(SizeError, match=message):
        teacher_sizes(chosen, load_teachers(chosen, CPU))


def test_student_resolutions(config: TrainConfig) -> None:
    teachers = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=96))
    assert student_resolutions(replace(config, teachers=teachers)) == {
        "clip": (48,),
        "dense": (48,),
        "sam": (96,),
    }


def test_facts_come_from_the_ranks_where_the_teachers_live(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gather_facts(config, load_teachers(config, CPU), Ranks())
    assert (whole["clip"].sizes, whole["clip"].summary_dim, whole["clip"].token_dim) == (
        {48: (50, 50)},
        12,
        24,
    )
    elsewhere = {"clip": whole["clip"], "dense": whole["dense"]}
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, mine: [elsewhere, mine])
    shared = gather_facts(config, load_teachers(config, CPU, ("sam",)), Ranks(1, 2))
    assert list(shared.items()) == list(whole.items())


def build_model(config: TrainConfig) -> RadioModel:
    return build(model_config(config, load_teachers(config, CPU)), 0)


def at_sizes(config: TrainConfig, *sides: int) -> TrainConfig:
    """With a teacher for each input side of the student."""
    teachers = [replace(t, student_resolution=side) for t, side in zip(TEACHERS, sides, strict=False)]
    return replace(config, teachers=tuple(teachers))


@pytest.mark.parametrize(
    ("summary", "summary_dim", "slots"),
    [("shared", 128, [None] * 3), ("per-teacher", 384, [0, 1, 2]), ("mean", 128, [None] * 3)],
)
def test_summaries(config: TrainConfig, summary: str, summary_dim: int, slots: list[int | None]) -> None:
    chosen = replace(config, summary=summary)  # type: ignore[arg-type]
    model = build_model(chosen)
    assert model.summary_dim == summary_dim
    assert [adaptor.slot for adaptor in model.config.adaptors] == slots
    tokens = model.state_dict()["student.prefix"].shape[1]
    assert tokens == {"shared": 1, "per-teacher": 3, "mean": 0}[summary]


def test_summaries_of_a_student_without_class_tokens(config: TrainConfig) -> None:
    for summary in ("shared", "mean"):
        chosen = replace(config, student="e-radio-tiny", summary=summary)  # type: ignore[arg-type]
        assert build_model(chosen).summary_dim == build_model(chosen).token_dim
    with pytest.raises(ConfigError, match=r"e-radio-tiny has no class tokens, .* --summary shared or mean"):
        build_model(replace(config, student="e-radio-tiny", summary="per-teacher"))


def test_class_tokens_are_set_once(config: TrainConfig) -> None:
    twice = replace(config, summary="mean", options=ViTOptions(class_tokens=1))
    with pytest.raises(ConfigError, match=r"--summary mean decides the class tokens; leave --student\.class"):
        build_model(twice)


def test_windows_that_divide_each_grid(config: TrainConfig) -> None:
    windowed = replace(at_sizes(config, 96, 144, 216), student="vitdet-tiny12", windows=(2, 3, 4, 6, 8, 9))
    # Grids of 8, 12 and 18 tokens a side; a window that covers the whole grid is left out.
    assert choose_windows(build_model(windowed).student, windowed) == {
        96: (2, 4),
        144: (2, 3, 4, 6),
        216: (2, 3, 6, 9),
    }


def test_students_that_keep_their_window(config: TrainConfig) -> None:
    fixed = replace(config, student="vitdet-tiny12", options=ViTDetOptions(window=2), windows=(2, 4))
    assert choose_windows(build_model(fixed).student, at_sizes(fixed, 96)) == {96: ()}
    plain = replace(config, windows=(2, 4))
    assert choose_windows(build_model(plain).student, at_sizes(plain, 96)) == {96: ()}
    by_size = replace(config, student="e-radio-tiny", windows=(2, 4, 7))
    hybrid = build_model(by_size).student
    assert choose_windows(hybrid, at_sizes(by_size, 96, 168)) == {96: (), 168: ()}
    with pytest.raises(SizeError, match=r"cannot take 130x130 px; .* is 120x120"):
        choose_windows(hybrid, at_sizes(by_size, 130))


@pytest.mark.parametrize(
    ("student", "side", "options"),
    [
        ("e-radio-tiny", 168, StudentOptions()),  # one window of 7 tokens of 24 px
        ("e-radio-b", 160, StudentOptions()),  # one window of 5 tokens of 32 px
        ("e-radio-tiny", 144, ERadioOptions(window=6)),
        ("vit-tiny12", 168, StudentOptions()),
        ("vit-tiny16", 176, StudentOptions()),
        ("vitdet-tiny12", 168, StudentOptions()),  # 7 of the windows to draw from divides 14 tokens
        ("vitdet-tiny12", 192, ViTDetOptions(window=4)),
    ],
)
def test_the_size_beside_a_teacher_is_the_nearest(
    config: TrainConfig, student: str, side: int, options: StudentOptions
) -> None:
    teachers = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=168))
    asked = replace(config, student=student, teachers=teachers, options=options)
    found, changes = round_resolutions(asked)
    assert student_resolutions(found) == {"clip": (48,), "dense": (48,), "sam": (side,)}
    assert replace(found, teachers=teachers) == asked
    line = f"{student} cannot see 168 px beside sam; it sees {side}, the nearest that it takes"
    assert changes == ([] if side == 168 else [line])


@pytest.mark.parametrize(
    ("student", "side"),
    [
        ("timm:test_resnet", 160),
        ("timm:test_vit", 176),
        ("timm:test_maxvit", 168),  # unchanged: it takes only the size that it is built for
    ],
)
def test_the_size_of_timms_students_beside_a_teacher(config: TrainConfig, student: str, side: int) -> None:
    teachers = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=168))
    found, _ = round_resolutions(replace(config, student=student, teachers=teachers, resolution=96))
    assert student_resolutions(found) == {"clip": (96,), "dense": (96,), "sam": (side,)}


def test_a_resolution_that_the_student_cannot_take(config: TrainConfig) -> None:
    student = build_model(config).student
    assert choose_windows(student, at_sizes(config, 48, 96)) == {48: (), 96: ()}
    message = "student vit-tiny12 cannot take 50x50 px; the nearest size that it can is 48x48"
    with pytest.raises(SizeError, match=message):
        choose_windows(student, at_sizes(config, 50))


def test_the_card_names_teachers_and_data(config: TrainConfig) -> None:
    teachers = load_teachers(config, CPU)
    images = open_images(config.data)
    metadata = make_metadata(config, gather_facts(config, teachers, Ranks()), images)
    assert metadata["name"] == "run"
    assert metadata["resolution"] == 48
    assert metadata["teachers"][2] == {
        "name": "sam",
        "model": "tiny:sam",
        "resolution": [108, 108],
        "student_resolution": 48,
        "fingerprint": teachers["sam"].fingerprint,
        "summary_weight": config.teachers[2].summary_weight,
    }
    assert metadata["data"]["count"] == 24
    assert metadata["data"]["fingerprint"] == images.fingerprint
    assert metadata["settings"]["optim"]["lr"] == config.optim.lr


def test_a_run_is_called_by_its_folder_however_that_is_given(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = [run_name(replace(config, out=Path(out))) for out in ("", ".", "..", "x/..", "runs/y")]
    assert names == ["here", "here", tmp_path.name, "here", "y"]


@pytest.mark.parametrize("option", ["--out", "--cache.folder"])
def test_a_folder_whose_name_is_no_text_is_refused(config: TrainConfig, option: str) -> None:
    odd = Path("runs/x\udcff")  # as Python has a name of the byte 0xff; safetensors could not read it back
    changed = (
        replace(config, out=odd) if option == "--out" else replace(config, cache=CacheConfig(folder=odd))
    )
    with pytest.raises(ConfigError, match=rf"^{option} runs/x\\udcff: is no UTF-8 text; choose another"):
        check_settings(changed, 1)
