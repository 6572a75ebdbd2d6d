import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import radio.scenes.export as writer
from evals.sam_dropin.annotations import read_instances, read_results
from radio.errors import ConfigError
from radio.scenes import CLASSES, SHAPES, SceneError, caption, captions, questions, render, semantic, write
from radio.scenes.detector import search
from radio.scenes.export import LAYOUTS, METADATA_FILE, ScenesSettings, write_cached

NAMES = ("ade20k", "coco", "image-folder", "llava", "lvis", "webdataset")


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several jobs and shards from few scenes."""
    monkeypatch.setattr(writer, "_CHUNK", 5)


def settings(layout: str, **changes: int) -> ScenesSettings:
    return ScenesSettings(**{"layout": layout, "count": 12, "val_count": 3, "seed": 4, "size": 48, **changes})


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_close(stored: Image.Image, image: np.ndarray) -> None:
    """A JPEG of the scene: the same size, within its losses."""
    array = np.asarray(stored.convert("RGB"), dtype=float).transpose(2, 0, 1)
    assert array.shape == image.shape
    assert np.abs(array - image).mean() < 4


def test_the_layouts_are_known() -> None:
    assert tuple(LAYOUTS) == NAMES


@pytest.mark.parametrize(
    "layout", ["coco", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "coco")]
)
def test_bytes_do_not_depend_on_workers_and_progress_adds_up(tmp_path: Path, layout: str) -> None:
    done: list[int] = []
    assert write(tmp_path / "one", settings(layout), workers=1, progress=done.append)
    assert write(tmp_path / "two", settings(layout), workers=2)
    assert sum(done) == 15
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("layout", NAMES)
def test_bytes_do_not_depend_on_the_order_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    write(tmp_path / "one", settings(layout))
    monkeypatch.setattr(
        writer, "_run", lambda jobs, _: [(job, writer.run_job(job)) for job in reversed(jobs)]
    )
    write(tmp_path / "two", settings(layout))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_image_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("image-folder"))
    for split, count in (("train", 12), ("val", 3)):
        paths = sorted((tmp_path / "out" / split).rglob("*.png"), key=lambda path: path.name)
        assert len(paths) == count
        for index, path in enumerate(paths):
            scene = render(index, split=split, seed=4, size=48)
            assert path.parent.name == CLASSES[scene.label].replace(" ", "_")
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(image).transpose(2, 0, 1), scene.image)
        assert all(any(folder.iterdir()) for folder in (tmp_path / "out" / split).iterdir())


def test_webdataset(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("webdataset"))
    shards = sorted((tmp_path / "out").glob("train-*.tar"))
    assert [shard.name for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    index = 0
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for key in sorted({name.split(".")[0] for name in files}):
            scene = render(index, seed=4, size=48)
            assert_close(Image.open(io.BytesIO(files[f"{key}.jpg"])), scene.image)
            assert int(files[f"{key}.cls"]) == scene.label
            assert files[f"{key}.txt"].decode() == caption(scene, index, seed=4)
            facts = json.loads(files[f"{key}.json"])
            assert facts["class"] == CLASSES[scene.label]
            assert [tuple(item["box"]) for item in facts["objects"]] == [item.box for item in scene.objects]
            index += 1
    assert index == 12


def test_ade20k(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("ade20k"))
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["background", *SHAPES]
    for split, folder, count in (("train", "training", 12), ("val", "validation", 3)):
        images = sorted((tmp_path / "out" / "images" / folder).iterdir())
        masks = sorted((tmp_path / "out" / "annotations" / folder).iterdir())
        assert [path.stem for path in images] == [path.stem for path in masks]
        assert len(images) == count
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            scene = render(index, split=split, seed=4, size=48)
            with Image.open(image) as stored, Image.open(mask) as labels:
                assert_close(stored, scene.image)
                assert labels.mode == "L"
                assert np.array_equal(np.asarray(labels), semantic(scene) + 1)


def test_lvis_is_read_as_what_was_searched_and_found(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("lvis"))
    truth = read_instances(tmp_path / "out" / "annotations" / "lvis_val.json")
    assert list(truth.categories.values()) == list(CLASSES)
    assert Counter(truth.frequencies.values()) == {"r": 20, "c": 20, "f": 20}
    counts = Counter(id for image in truth.images for id in {each.category for each in image.instances})
    of_mark = {mark: [counts[id] for id, each in truth.frequencies.items() if each == mark] for mark in "rcf"}
    assert max(of_mark["r"]) <= min(of_mark["c"]) and max(of_mark["c"]) <= min(of_mark["f"])
    found, _ = read_results(tmp_path / "out" / "annotations" / "detections_val.json")
    for index, image in enumerate(truth.images):
        scene = render(index, split="val", seed=4, size=48)
        assert_close(Image.open(tmp_path / "out" / "val" / image.name), scene.image)
        labels = [item.colour * 10 + item.shape for item in scene.objects]
        assert [(each.category - 1, each.box) for each in image.instances] == [
            (label, item.box) for label, item in zip(labels, scene.objects, strict=True)
        ]
        expected = search(scene, index, split="val", seed=4)
        assert image.searched == {label + 1 for label in (*labels, *expected.absent)}
        assert image.not_exhaustive == {label + 1 for label in expected.not_exhaustive}
        of_image = [each for each in found if each.image_id == image.id]
        assert [(each.instance.category - 1, each.score) for each in of_image] == [
            (box.label, box.score) for box in expected.boxes
        ]
        for each, box in zip(of_image, expected.boxes, strict=True):
            assert each.instance.box == pytest.approx(box.corners, abs=1e-9)


# pycocotools 2.0 hands its own buffers to numpy 2 the old way
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_reads_back_through_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = pytest.importorskip("pycocotools.coco").COCO
    write(tmp_path / "out", settings("coco"))
    for split, count in (("train", 12), ("val", 3)):
        coco = reader(str(tmp_path / "out" / "annotations" / f"instances_{split}.json"))
        said = reader(str(tmp_path / "out" / "annotations" / f"captions_{split}.json"))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(SHAPES)
        assert len(coco.getImgIds()) == count
        for index, image_id in enumerate(coco.getImgIds()):
            scene = render(index, split=split, seed=4, size=48)
            (info,) = coco.loadImgs(image_id)
            with Image.open(tmp_path / "out" / split / info["file_name"]) as image:
                assert_close(image, scene.image)
            found = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
            assert len(found) == len(scene.objects)
            for number, (annotation, item) in enumerate(zip(found, scene.objects, strict=True), start=1):
                assert np.array_equal(coco.annToMask(annotation) == 1, scene.instances == number)
                x, y, width, height = annotation["bbox"]
                assert (x, y, x + width, y + height) == item.box
                assert annotation["area"] == item.area
                assert annotation["category_id"] == item.shape + 1
                assert annotation["iscrowd"] == 0
            texts = [annotation["caption"] for annotation in said.loadAnns(said.getAnnIds(imgIds=image_id))]
            assert tuple(texts) == captions(scene)


def test_llava(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("llava"))
    pretrain = json.loads((tmp_path / "out" / "pretrain_val.json").read_text())
    instruct = json.loads((tmp_path / "out" / "instruct_val.json").read_text())
    assert len(pretrain) == len(instruct) == 3
    for index, (first, second) in enumerate(zip(pretrain, instruct, strict=True)):
        scene = render(index, split="val", seed=4, size=48)
        assert first["image"] == second["image"]
        with Image.open(tmp_path / "out" / first["image"]) as image:
            assert_close(image, scene.image)
        assert [turn["value"] for turn in first["conversations"]] == [
            "<image>",
            caption(scene, index, split="val", seed=4),
        ]
        turns = second["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>\n") for turn in turns] == [1] + [0] * (len(turns) - 1)
        expected = questions(scene, index, split="val", seed=4)
        assert [turn["value"] for turn in turns[1::2]] == [question.answer for question in expected]
        for turn, question in zip(turns[::2], expected, strict=True):
            assert question.text in turn["value"]


def test_the_card_holds_the_settings_and_the_same_command_again_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert write(out, settings("coco", val_count=0))
    metadata = json.loads((out / METADATA_FILE).read_text())
    assert (
        metadata["layout"],
        metadata["count"],
        metadata["val_count"],
        metadata["seed"],
        metadata["size"],
    ) == (
        "coco",
        12,
        0,
        4,
        48,
    )
    assert metadata["classes"] == list(CLASSES)
    assert not (out / "annotations" / "instances_val.json").exists()
    before = contents(out)
    assert not write(out, settings("coco", val_count=0))
    assert contents(out) == before
    with pytest.raises(SceneError, match="holds scenes of other settings"):
        write(out, settings("coco", val_count=0, seed=5))


def test_an_empty_folder_may_be_filled_and_a_foreign_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", settings("image-folder"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(SceneError, match="is not empty and was not written by radio-scenes"):
        write(tmp_path / "foreign", settings("image-folder"))
    (tmp_path / "foreign" / METADATA_FILE).write_text("no json")
    with pytest.raises(SceneError, match="is not metadata"):
        write(tmp_path / "foreign", settings("image-folder"))
    with pytest.raises(SceneError, match="is a file"):
        write(tmp_path / "foreign" / "thesis.txt", settings("image-folder"))
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe\x00", b"[]", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_card_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / METADATA_FILE).write_bytes(content)
    with pytest.raises(SceneError, match=r"is not metadata of radio-scenes \(.*\); choose another folder"):
        write(tmp_path / "out", settings("coco"))


@pytest.mark.parametrize("seed", [4, 5])
def test_who_comes_second_takes_what_stands(tmp_path: Path, seed: int) -> None:
    """Another process finishes the same scenes, or others, while we draw ours."""
    out = tmp_path / "out"
    first: list[int] = []

    def meanwhile(done: int) -> None:
        if not first:
            first.append(done)
            write(out, settings("coco", seed=seed))

    if seed == 4:
        assert not write(out, settings("coco"), progress=meanwhile)
    else:
        with pytest.raises(SceneError, match="holds scenes of other settings"):
            write(out, settings("coco"), progress=meanwhile)
    assert (out / METADATA_FILE).is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / METADATA_FILE).write_bytes(b"[" * 100_000),
        lambda out: (out / METADATA_FILE).unlink(),
        lambda out: (out / "val" / "000000000001.jpg").write_bytes(b"other"),
        lambda out: (out / "val" / "000000000001.jpg").unlink(),
        lambda out: (out / "annotations" / "instances_val.json").write_bytes(b'{"images": ['),
        lambda out: (shutil.rmtree(out), out.write_bytes(b"a file")),
        lambda out: out.with_name("out.sha256").write_bytes(b"\xff\xff"),
    ],
)
def test_damaged_scenes_in_a_cache_are_made_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    out, reasons = tmp_path / "out", []
    write_cached(out, settings("coco"), reasons.append)
    before = contents(tmp_path)
    assert (reasons, contents(out)) == ([], {k[4:]: v for k, v in before.items() if k.startswith("out/")})
    damage(out)
    write_cached(out, settings("coco"), reasons.append)
    assert len(reasons) == 1 and contents(tmp_path) == before
    write_cached(out, settings("coco"), reasons.append)
    assert len(reasons) == 1


def test_scenes_of_another_version_are_taken_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "out", settings("coco"))
    write_cached(tmp_path / "out", settings("coco"), pytest.fail)
    assert (tmp_path / "out.sha256").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", settings("image-folder"), progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count: 0 is out of bounds"),
        ({"val_count": -1}, "--val-count: -1 is out of bounds"),
        ({"size": 3}, "--size: 3 is out of bounds; give a number of at least 32 and of at most 1024"),
        ({"seed": -1}, "--seed: -1"),
        ({"count": 10**15}, "--count: 1000000000000000 is out of bounds.* at most 10000000"),
    ],
)
def test_bad_settings_are_clear_errors(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "out", settings("coco", **changes))
    assert list(tmp_path.iterdir()) == []


def test_unknown_layout_and_no_workers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown layout 'cocoa'; did you mean coco"):
        write(tmp_path / "out", settings("cocoa"))
    with pytest.raises(SceneError, match="--workers 0"):
        write(tmp_path / "out", settings("coco"), workers=0)
