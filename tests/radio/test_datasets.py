from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from radio.datasets import (
    SET_NAMES,
    DataSets,
    GqaFiles,
    LlavaFiles,
    LvisFiles,
    ScienceQaFiles,
    TextVqaFiles,
    Vqav2Files,
    read_data_sets,
)
from radio.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.yaml"
    path.write_text(text)
    return path


def touched(root: Path, *names: str) -> Path:
    """Make files, and folders where a name ends in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def test_relative_paths_count_from_the_files_folder_and_patterns_stay_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    path = written(
        tmp_path / "sets",
        "imagenet: ../in\n"
        "imagenet-21k: shards/{000..002}.tar\n"
        "laion: https://host/{0..9}.tar\n"
        "datacomp: 'pipe:cat /x.tar'\n"
        "voc: ~/VOCdevkit\n"
        "coco: /data/coco\n"
        "weights:\n",
    )
    base = tmp_path / "sets"
    wanted = DataSets(
        imagenet=base / "../in",
        imagenet_21k=f"{base}/shards/{{000..002}}.tar",
        laion="https://host/{0..9}.tar",
        datacomp="pipe:cat /x.tar",
        voc=Path("/home/someone/VOCdevkit"),
        coco=Path("/data/coco"),
    )
    assert read_data_sets(path) == wanted
    assert read_data_sets(base) == wanted
    monkeypatch.chdir(tmp_path)
    assert read_data_sets(Path("sets/data.yaml")) == wanted


def test_parts_are_named_each_or_found_in_a_folder(tmp_path: Path) -> None:
    touched(tmp_path, "g/questions1.2/testdev_balanced_questions.json", "g/images/", "s/test/")
    written(
        tmp_path,
        "gqa: g\n"
        "sqa: s\n"
        "vqav2: nowhere\n"
        "textvqa:\n  questions: t/q.json\n  images: /i\n"
        "llava: {pretrain-data: p.json, pretrain-images: p, instruct-data: i.json, instruct-images: i.tar}\n",
    )
    sets = read_data_sets(tmp_path)
    assert sets.gqa == GqaFiles(
        questions=tmp_path / "g/questions1.2/testdev_balanced_questions.json", images=tmp_path / "g/images"
    )
    assert sets.sqa == ScienceQaFiles(  # absent parts are where they usually are, for the error that follows
        questions=tmp_path / "s/problems.json",
        splits=tmp_path / "s/pid_splits.json",
        images=tmp_path / "s/test",
    )
    assert sets.vqav2 == Vqav2Files(
        questions=tmp_path / "nowhere/v2_OpenEnded_mscoco_val2014_questions.json",
        images=tmp_path / "nowhere/val2014",
    )
    assert sets.textvqa == TextVqaFiles(questions=tmp_path / "t/q.json", images=Path("/i"))
    assert sets.llava == LlavaFiles(
        pretrain_data=tmp_path / "p.json",
        pretrain_images=tmp_path / "p",
        instruct_data=tmp_path / "i.json",
        instruct_images=tmp_path / "i.tar",
    )


def test_folders_are_found_by_the_names_of_the_sets(tmp_path: Path) -> None:
    touched(
        tmp_path,
        "imagenet/val/",
        "imagenet-21k/0.tar",
        "laion/readme.txt",  # no shards
        "datacomp/shards/00000000.tar",
        "ADEChallengeData2016/images/",
        "VOCdevkit/VOC2012/",
        "VOC2010/SegmentationClassContext/",
        "coco_stuff164k/annotations/val2017/",
        "lvis/annotations/lvis_v1_val.json",
        "coco/train2017/",  # images of LLaVA's alone, nothing to score
        "playground/data/llava_v1_5_mix665k.json",
        "playground/data/LLaVA-Pretrain/images/",
        "roxford5k/gnd_roxford5k.json",
        "RParis6k/gnd_rparis6k.pkl",
        "SPair-71k/PairAnnotation/",
        "gqa/images/",  # as above
        "textvqa/TextVQA_0.5.1_val.json",
        "ScienceQA/problems.json",
        "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json",
        "vqav2/test2015/",
        "vicuna-7b-v1.5/config.json",
        "weights/",  # empty
    )
    sets = read_data_sets(tmp_path)
    data = tmp_path / "playground/data"
    assert sets == DataSets(
        imagenet=tmp_path / "imagenet",
        imagenet_21k=f"{tmp_path}/imagenet-21k",
        datacomp=f"{tmp_path}/datacomp/shards",
        ade20k=tmp_path / "ADEChallengeData2016",
        voc=tmp_path / "VOCdevkit",
        context=tmp_path / "VOC2010",
        coco_stuff=tmp_path / "coco_stuff164k",
        lvis=LvisFiles(annotations=tmp_path / "lvis/annotations/lvis_v1_val.json", images=tmp_path / "lvis"),
        roxford5k=tmp_path / "roxford5k",
        rparis6k=tmp_path / "RParis6k",
        spair=tmp_path / "SPair-71k",
        llava=LlavaFiles(
            pretrain_data=data / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            pretrain_images=data / "LLaVA-Pretrain/images",
            instruct_data=data / "llava_v1_5_mix665k.json",
            instruct_images=data,
        ),
        textvqa=TextVqaFiles(
            questions=tmp_path / "textvqa/TextVQA_0.5.1_val.json", images=tmp_path / "textvqa/train_images"
        ),
        sqa=ScienceQaFiles(
            questions=tmp_path / "ScienceQA/problems.json",
            splits=tmp_path / "ScienceQA/pid_splits.json",
            images=tmp_path / "ScienceQA",
        ),
        vqav2=Vqav2Files(
            questions=tmp_path / "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json",
            images=tmp_path / "vqav2/test2015",
        ),
        language_model=tmp_path / "vicuna-7b-v1.5",
    )


_VAL = "v2_OpenEnded_mscoco_val2014_questions.json"
_TEST = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
_ANSWERS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("there", "questions", "images", "answers"),
    [
        ((_TEST, "test2015/", "val2014/", _ANSWERS), _TEST, "test2015", None),
        ((_TEST, "val2014/", _ANSWERS), _TEST, "test2015", None),  # told as missing
        ((_TEST, "val2014/", "images/"), _TEST, "images", None),
        ((_VAL, _TEST, "test2015/", "val2014/", _ANSWERS), _VAL, "val2014", _ANSWERS),
        ((_VAL, "test2015/", _ANSWERS), _VAL, "val2014", _ANSWERS),
    ],
)
def test_the_parts_of_vqav2_are_of_one_split(
    tmp_path: Path, there: tuple[str, ...], questions: str, images: str, answers: str | None
) -> None:
    folder = touched(tmp_path / "vqav2", *there)
    assert read_data_sets(tmp_path).vqav2 == Vqav2Files(
        questions=folder / questions,
        images=folder / images,
        answers=None if answers is None else folder / answers,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("imagnet: x", "unknown setting 'imagnet'; did you mean imagenet or imagenet_r or imagenet_a?"),
        ("gqa: {question: x}", "unknown setting 'gqa.question'; did you mean questions?"),
        ("gqa: {questions: x}", "missing setting 'gqa.images'; give it a value"),
        ("gqa: 3", "gqa: wanted its folder, or a mapping with questions, images; got 3"),
        ("imagenet: 3", "imagenet: wanted Path, got 3"),
        ("laion: [a.tar]", "laion: wanted str, got a list of 1"),
        ("imagenet: ''", "imagenet: names nothing; give its place, or leave it out"),
        (
            "imagenet: ~nosuchuser/x",
            "imagenet: ~nosuchuser/x begins with the home of a user who has none here; write the whole path",
        ),
        (
            "gqa: {questions: ~nosuchuser/q, images: x}",
            "questions: ~nosuchuser/q begins with the home of a user who has none here; write the whole path",
        ),
        (
            "imagenet-21k: a\nimagenet_21k: b",
            "'imagenet_21k' stands there twice, once with _ and once with -; keep one",
        ),
        ("", "wanted data sets and where they are, as in imagenet: /data/imagenet; got nothing"),
        ("/data", "wanted data sets and where they are, as in imagenet: /data/imagenet; got '/data'"),
        ('coco: "a\\0b"', "coco: wanted a text of at most 4096 letters without a NUL among them; mend it"),
    ],
)
def test_a_file_that_names_something_else_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_data_sets(path)
    assert str(caught.value) == f"{path}: {said}"


def test_the_documented_file_names_every_set(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs" / "evaluators.md"
    text = docs.read_text().partition("```yaml\n")[2].partition("```")[0]
    sets = read_data_sets(written(tmp_path, text))
    assert all(getattr(sets, field.name) is not None for field in fields(DataSets))
    parts = text.partition("# llava: ")[2].partition("\n")[0]
    assert read_data_sets(written(tmp_path, f"llava: {parts}")).llava is not None


def test_a_root_without_data_sets_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_data_sets(tmp_path / "nosuch")
    assert str(caught.value) == (
        f"{tmp_path}/nosuch: no such file or folder; give a data.yaml that names your data sets, or their "
        f"folder"
    )
    with pytest.raises(ConfigError) as caught:
        read_data_sets(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: has neither a data.yaml nor a data set's folder; write a data.yaml into it, or call "
        f"the folders {', '.join(SET_NAMES)}"
    )
    assert "imagenet-21k, laion" in str(caught.value)
