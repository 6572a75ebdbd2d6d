"""`radio-eval data` and `--data-root` on the layouts in which the data sets are published."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.cli import main
from radio.entry import evaluate

SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(autouse=True)
def _wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")


def save_image(path: Path, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> None:
    """Write a noisy image of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, 3)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_labels(path: Path, highest: int, size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, highest, dtype=np.uint8)).save(path)


def save_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_imagenet(root: Path) -> None:
    for synset in SYNSETS:
        for number in range(2):
            save_image(root / "train" / synset / f"{synset}_{number}.JPEG")
        save_image(root / "val" / synset / f"ILSVRC2012_val_{SYNSETS.index(synset):08d}.JPEG")


def write_imagenet_v2(root: Path) -> None:
    for number in range(3):
        save_image(root / str(number) / f"{number}.jpeg")


def rename_class_of_v2(root: Path) -> None:
    folder = root / "imagenetv2-matched-frequency-format-val"
    (folder / "2").rename(folder / "1000")


def write_imagenet_r(root: Path) -> None:
    (root / "README.txt").parent.mkdir(parents=True)
    (root / "README.txt").write_text("renditions")
    save_image(root / "n01443537" / "art_0.jpg")


def write_ade(root: Path) -> None:
    for split, short, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            save_image(root / "images" / split / f"ADE_{short}_{number:08d}.jpg")
            save_labels(root / "annotations" / split / f"ADE_{short}_{number:08d}.png", 150)
    (root / "objectInfo150.txt").write_text("Idx\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport\n")


def write_voc(root: Path) -> None:
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    for name, keys in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{key}\n" for key in keys))
        for key in keys:
            save_image(root / "JPEGImages" / f"{key}.jpg")
            save_labels(root / "SegmentationClass" / f"{key}.png", 20)


def write_context(root: Path) -> None:
    for name in ("train", "val"):
        key, path = f"2008_00000{len(name)}", root / "ImageSets" / "SegmentationContext" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{key}\n")
        save_image(root / "JPEGImages" / f"{key}.jpg")
        save_labels(root / "SegmentationClassContext" / f"{key}.png", 59)


def write_stuff(root: Path) -> None:
    for number in range(2):
        save_image(root / "images" / "val2017" / f"{number:012d}.jpg")
        save_labels(root / "annotations" / "val2017" / f"{number:012d}_labelTrainIds.png", 170)


def write_lvis(root: Path) -> None:
    """LVIS's validation images lie in both of COCO's folders."""
    names = ("train2017/000000000139.jpg", "val2017/000000000285.jpg")
    for name in names:
        save_image(root / name)
    polygon = [[1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]]
    annotation = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 25.0, "segmentation": polygon}
    searched = {"neg_category_ids": [], "not_exhaustive_category_ids": [], "height": 16, "width": 12}
    save_json(
        root / "lvis_v1_val.json",
        {
            "images": [
                {"id": id, "coco_url": f"http://images.cocodataset.org/{name}", **searched}
                for id, name in enumerate(names)
            ],
            "annotations": [{**annotation, "id": id, "image_id": id} for id in range(2)],
            "categories": [{"id": 1, "name": "aerosol_can", "frequency": "c"}],
        },
    )


def write_nyu(root: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        pairs = [(f"bath/{split}_{n}.jpg", f"bath/{split}_{n}.png") for n in range(count)]
        for image, depth in pairs:
            save_image(root / image)
            save_labels(root / depth, 1)
        (root / f"nyu_{split}.txt").write_text("".join(f"{a} {b} 518.8579\n" for a, b in pairs))


def write_pope(root: Path) -> None:
    name = "COCO_val2014_000000310196.jpg"
    save_image(root / "val2014" / name)
    for sampling in ("random", "popular", "adversarial"):
        record = {"question_id": 1, "image": name, "text": "Is there a dog in the image?", "label": "no"}
        save_json(root / "coco" / f"coco_pope_{sampling}.json", record)


def write_coco(root: Path) -> None:
    names = [f"{number:012d}.jpg" for number in (139, 285)]
    for name in names:
        save_image(root / "val2017" / name)
    annotation = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 25.0, "iscrowd": 0}
    polygon = [[1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]]
    save_json(
        root / "annotations" / "instances_val2017.json",
        {
            "images": [
                {"id": id, "file_name": name, "height": 16, "width": 12}
                for id, name in zip((139, 285), names, strict=True)
            ],
            "annotations": [
                {**annotation, "id": id, "image_id": image, "segmentation": polygon}
                for id, image in ((1, 139), (2, 139), (3, 285))
            ],
            "categories": [{"id": 1, "name": "person"}],
        },
    )


LLAVA_IMAGES = (
    "coco/train2017/000000033471.jpg",
    "gqa/images/2354786.jpg",
    "ocr_vqa/images/0198788.jpg",
    "textvqa/train_images/a.jpg",
    "vg/VG_100K/2.jpg",
    "vg/VG_100K_2/3.jpg",
)


def record(id: str, image: str | None, answer: str = "A cat.") -> dict[str, Any]:
    """A record of LLaVA's."""
    mark = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": f"{mark}What is it?"}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


def write_llava(root: Path) -> None:
    pretrain = root / "LLaVA-Pretrain"
    names = ["00453/004539375.jpg", "00223/002239345.jpg"]
    for name in names:
        save_image(pretrain / "images" / name)
    records = [record(Path(name).stem, name) for name in names]
    save_json(pretrain / "blip_laion_cc_sbu_558k.json", records)
    for name in LLAVA_IMAGES:
        save_image(root / name)
    mix = [record(str(place), name) for place, name in enumerate((*LLAVA_IMAGES, LLAVA_IMAGES[0]))]
    save_json(root / "llava_v1_5_mix665k.json", [*mix, record("sharegpt", None)])


def write_gqa(root: Path) -> None:
    question = {"question": "What is it?", "imageId": "n161313", "isBalanced": True, "answer": "cat"}
    save_json(root / "testdev_balanced_questions.json", {"201307251": question, "201640614": question})
    save_image(root / "images" / "n161313.jpg")


def write_textvqa(root: Path) -> None:
    question = {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what brand?"}
    save_json(
        root / "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "data": [{**question, "answers": ["dakota"] * 10}]},
    )
    save_json(
        root / "TextVQA_Rosetta_OCR_v0.2_val.json",
        {"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA"]}]},
    )
    save_image(root / "train_images" / "003a8ae2ef43b901.jpg")


def write_scienceqa(root: Path) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "split": "test"}
    problems = {"4": {**problem, "image": "image.png"}, "5": {**problem, "image": None}}
    save_json(root / "problems.json", problems)
    save_json(root / "pid_splits.json", {"test": ["4", "5"]})
    save_image(root / "images" / "test" / "4" / "image.png")


def write_vqav2(root: Path) -> None:
    question = {"image_id": 262148, "question": "Where is he?", "question_id": 262148000}
    save_json(
        root / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": [question]},
    )
    answers = [{"answer": "down", "answer_id": id} for id in range(1, 11)]
    answer = {"image_id": 262148, "question_id": 262148000, "answer_type": "other", "answers": answers}
    save_json(
        root / "v2_mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": [answer]}
    )
    save_image(root / "val2014" / "COCO_val2014_000000262148.jpg")


SETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "imagenet": ("imagenet", write_imagenet),
    "imagenet-v2": ("imagenetv2-matched-frequency-format-val", write_imagenet_v2),
    "imagenet-r": ("imagenet-r", write_imagenet_r),
    "ade20k": ("ADEChallengeData2016", write_ade),
    "voc": ("VOCdevkit/VOC2012", write_voc),
    "context": ("VOC2010", write_context),
    "coco-stuff": ("coco_stuff164k", write_stuff),
    "nyu": ("nyu", write_nyu),
    "coco": ("coco", write_coco),
    "lvis": ("lvis", write_lvis),
    "llava": ("llava", write_llava),
    "gqa": ("gqa", write_gqa),
    "textvqa": ("textvqa", write_textvqa),
    "sqa": ("scienceqa", write_scienceqa),
    "vqav2": ("vqav2", write_vqav2),
    "pope": ("pope", write_pope),
}
ABSENT = ("imagenet-a", "imagenet-sketch", "imagenet-21k", "laion", "roxford5k", "rparis6k", "spair")
ABSENT += ("language-model",)
HOLDS = {
    "imagenet train": "6 images of 3 classes",
    "imagenet val": "3 images of 3 classes",
    "imagenet-v2": "3 images of 3 classes",
    "imagenet-r": "1 images of 1 classes",
    "datacomp": "2 shards, 0.0 GB, 3 images in the first",
    "ade20k": "images with annotations: training 3, validation 2",
    "voc": "images with annotations: train 2, val 1",
    "context": "images with annotations: val 1",
    "coco-stuff": "images with annotations: val2017 2",
    "nyu train": "3 images with depth",
    "nyu test": "2 images with depth",
    "coco": "2 images, 3 instances",
    "lvis": "2 images, 2 instances",
    "llava pretrain": "2 records, 2 images",
    "llava instruct": "8 records, 6 images",
    "gqa": "testdev: 2 questions, 1 images",
    "textvqa": "val: 1 questions, 1 images",
    "sqa": "test: 1 questions, 1 images",
    "vqav2": "val: 1 questions, 1 images",
    "pope": "coco: 3 questions, 1 images",
    "weights": "1 files, 0.0 GB",
}


def write_shards(root: Path, make_shard: Callable[..., Path], png: Callable[[int, int], bytes]) -> None:
    for number in range(2):
        members = [(f"{index:03d}.png", png(16, 12)) for index in range(3)]
        make_shard(root / f"{number:08d}.tar", members)


@pytest.fixture
def root(tmp_path: Path, make_shard: Callable[..., Path], png: Callable[[int, int], bytes]) -> Path:
    """A folder that has every data set but a few, by the names of the folders."""
    for name, write in SETS.values():
        write(tmp_path / "data" / name)
    write_shards(tmp_path / "data" / "datacomp" / "shards", make_shard, png)
    (tmp_path / "data" / "weights").mkdir()
    (tmp_path / "data" / "weights" / "sam_vit_h.pth").write_bytes(b"weights")
    return tmp_path / "data"


def table_of(out: str) -> dict[str, list[str]]:
    """Return the cells of the table's rows by the first one."""
    rows = [line.strip("│| ").split("│" if "│" in line else "|") for line in out.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 4}


SMALLER = (" has 1,281,167", " has 50,000", "; ADE20K has 20,210", "; ADE20K has 2,000")
SMALLER += ("; ImageNet-V2 has 10,000", "; ImageNet-R has 30,000")
SMALLER += ("; Pascal Context has 5,104", "; COCO-Stuff has 5,000")
SMALLER += ("; VOC2012 has 1,464", "; VOC2012 has 1,449", "; NYU's test has 654")


def below(out: str) -> list[str]:
    """Return the lines below the table, but for the notes that these sets are smaller than the published."""
    lines = [line for line in out.splitlines() if line and line[0] not in "╭│├╰+|"]
    return [line for line in lines if not line.endswith(SMALLER)]


def test_landmarks_and_pairs_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = {"bbx": [0, 0, 9, 9], "easy": [0], "hard": [1], "junk": []}
    for name, images in (("roxford5k", ["a", "b", "q"]), ("rparis6k", ["a", "q"])):  # one is absent
        for image in images:
            save_image(tmp_path / name / "jpg" / f"{image}.jpg")
        save_json(
            tmp_path / name / f"gnd_{name}.json", {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [truth]}
        )
    pair = {
        "src_imname": "1.jpg",
        "trg_imname": "2.jpg",
        "src_imsize": [12, 16, 3],
        "trg_imsize": [12, 16, 3],
        "category": "cat",
        "src_kps": [[1, 2]],
        "trg_kps": [[3, 4]],
        "trg_bndbox": [0, 0, 9, 9],
        "viewpoint_variation": 0,
    }
    save_json(tmp_path / "SPair-71k" / "PairAnnotation" / "test" / "1-1-2:cat.json", pair)
    for name in ("1", "2"):
        save_image(tmp_path / "SPair-71k" / "JPEGImages" / "cat" / f"{name}.jpg")
    assert main(["data", "--data-root", str(tmp_path), "--check"]) == 1
    out = capsys.readouterr().out
    table = table_of(out)
    assert table["roxford5k"][1:] == ["2 images, 1 queries", "complete"]
    assert table["spair"][1:] == ["1 pairs of 2 images, 1 classes", "complete"]
    assert table["rparis6k"][1:] == ["", "missing"]
    assert any("jpg/b.jpg: no such image (1 of 2 are absent)" in line for line in out.splitlines())


def test_sets_that_are_right_are_counted_and_complete(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--data-root", str(root), "--check"]) == 0
    out = capsys.readouterr().out
    table = table_of(out)
    assert {name: cells[1] for name, cells in table.items() if cells[2] == "complete"} == HOLDS
    absent = {name: cells for name, cells in table.items() if cells[2] == "absent"}
    assert absent == {name: ["", "", "absent"] for name in ABSENT}
    assert table["gqa"][0] == f"{root}/gqa/testdev_balanced_questions.json"
    assert table["datacomp"][0] == f"{root}/datacomp/shards"
    assert below(out) == []
    notes = out.splitlines()
    assert "imagenet train: 6 images; ImageNet's train has 1,281,167" in notes
    assert "ade20k: ADEChallengeData2016/training has 3 images; ADE20K has 20,210" in notes


def test_without_check_only_the_places_are_listed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "gqa" / "testdev_balanced_questions.json").write_text("[")
    assert main(["data", "--data-root", str(root), "--plain"]) == 0
    table = table_of(capsys.readouterr().out)
    assert {name for name, cells in table.items() if cells[1:] == ["", "found"]} == set(HOLDS)
    (root / "data.yaml").write_text("coco: coco\nvoc: nowhere\n")
    monkeypatch.chdir(root)
    assert main(["data"]) == 1
    out = capsys.readouterr().out
    table = table_of(out)
    assert table["coco"] == [f"{root}/coco", "", "found"]
    assert table["voc"] == [f"{root}/nowhere", "", "missing"]
    assert below(out) == [f"voc: missing: {root}/nowhere: {NOWHERE}"]


def drop(*names: str) -> Callable[[Path], None]:
    """Delete files or folders."""

    def change(root: Path) -> None:
        for name in names:
            path = root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Truncate a file to its first half."""

    def change(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])

    return change


def edit(name: str, how: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the content of a JSON file."""

    def change(root: Path) -> None:
        data = json.loads((root / name).read_text())
        how(data)
        (root / name).write_text(json.dumps(data))

    return change


def flatten_val(root: Path) -> None:
    """Lay the validation images out as the archive unpacks."""
    for path in list((root / "imagenet/val").glob("*/*")):
        path.rename(root / "imagenet/val" / path.name)
        shutil.rmtree(path.parent)


def pack_train(root: Path) -> None:
    """Lay the training images out as the archive unpacks."""
    for folder in list((root / "imagenet/train").iterdir()):
        shutil.rmtree(folder)
        folder.with_suffix(".tar").touch()


def list_more(root: Path) -> None:
    with (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("2007_000061\n")


def swap(root: Path) -> None:
    """Give ADE20K's place to VOC2012."""
    shutil.rmtree(root / "ADEChallengeData2016")
    write_voc(root / "ADEChallengeData2016")
    (root / "ADEChallengeData2016/images").mkdir()


def empty_shard(root: Path) -> None:
    (root / "datacomp/shards/00000001.tar").write_bytes(b"")


def break_answers(data: Any) -> None:
    data[2]["conversations"][1]["value"] = " "


ADE, VOC = "ADEChallengeData2016", "VOCdevkit/VOC2012"
MIX, PRETRAIN = "llava/llava_v1_5_mix665k.json", "llava/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
NOWHERE = "no such file or folder; put it there, or name its place in the data.yaml"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            drop("imagenet/val/n01443537"),
            (
                "imagenet val: missing: {root}/imagenet/val/n01443537: no such folder (1 of the 3 "
                "classes of train are not in val); unpack the whole of it"
            ),
        ),
        (
            drop("imagenet/train/n01443537"),
            (
                "imagenet val: missing: {root}/imagenet/train/n01443537: no such folder (1 of the 3 "
                "classes of val are not in train); unpack the whole of it"
            ),
        ),
        (
            flatten_val,
            (
                "imagenet val: laid out wrong: {root}/imagenet/val: holds no folder a class: move each "
                "image into the folder of its class (val: as valprep.sh does)"
            ),
        ),
        (
            rename_class_of_v2,
            (
                "imagenet-v2: laid out wrong: {root}/imagenetv2-matched-frequency-format-val/1000: is none "
                "of ImageNet's classes; wanted their WordNet ids, or numbers from 0 to 999"
            ),
        ),
        (drop("imagenet/val"), "imagenet val: missing: {root}/imagenet/val: " + NOWHERE),
        (
            drop("imagenet/val/n01443537/ILSVRC2012_val_00000001.JPEG"),
            (
                "imagenet val: laid out wrong: {root}/imagenet/val/n01443537: a class folder without "
                "images; remove it or fill it"
            ),
        ),
        (
            empty_shard,
            (
                "datacomp: laid out wrong: {root}/datacomp/shards/00000001.tar: an empty file (1 of 2 "
                "shards are); fetch it again"
            ),
        ),
        (
            cut("datacomp/shards/00000000.tar"),
            (
                "datacomp: laid out wrong: {root}/datacomp/shards/00000000.tar: not a plain tar file, or "
                "a damaged one (a damaged header at byte 5120, or no end mark)"
            ),
        ),
        (
            drop("VOC2010/SegmentationClassContext/2008_000003.png"),
            (
                "context: missing: {root}/VOC2010/SegmentationClassContext/2008_000003.png: no such file, "
                "and its partner or list is there"
            ),
        ),
        (
            drop("VOC2010/ImageSets"),
            (
                "context: laid out wrong: {root}/VOC2010: is not in the layout of Pascal Context; see "
                "docs/evaluators.md"
            ),
        ),
        (
            drop("coco_stuff164k/annotations/val2017/000000000001_labelTrainIds.png"),
            (
                "coco-stuff: missing: "
                "{root}/coco_stuff164k/annotations/val2017/000000000001_labelTrainIds.png: no such file, "
                "and its partner or list is there"
            ),
        ),
        (
            drop("lvis/train2017"),
            (
                "lvis: missing: {root}/lvis: 1 of the 2 images of lvis_v1_val.json are not there: "
                "train2017/000000000139.jpg"
            ),
        ),
        (
            drop(f"{ADE}/annotations/validation/ADE_val_00000002.png"),
            (
                "ade20k: missing: {root}/ADEChallengeData2016/images/validation/ADE_val_00000002.jpg: "
                "has no annotation "
                "{root}/ADEChallengeData2016/annotations/validation/ADE_val_00000002.png (1 of 2 images "
                "lack theirs)"
            ),
        ),
        (
            drop(f"{ADE}/images/training/ADE_train_00000001.jpg"),
            (
                "ade20k: missing: "
                "{root}/ADEChallengeData2016/annotations/training/ADE_train_00000001.png: has no image "
                "of its name (1 such annotations)"
            ),
        ),
        (
            drop(f"{ADE}/annotations/validation"),
            (
                "ade20k: missing: {root}/ADEChallengeData2016/annotations/validation: no such folder; "
                "wanted images in {root}/ADEChallengeData2016/images/validation and masks in "
                "{root}/ADEChallengeData2016/annotations/validation"
            ),
        ),
        (
            swap,
            (
                "ade20k: laid out wrong: {root}/ADEChallengeData2016: is in the layout of VOC2012; "
                "wanted ADE20K's"
            ),
        ),
        (
            list_more,
            (
                "voc: missing: {root}/VOCdevkit/VOC2012/JPEGImages/2007_000061.jpg: no such image, and "
                "ImageSets/Segmentation lists it"
            ),
        ),
        (
            drop(f"{VOC}/SegmentationClass/2007_000033.png"),
            (
                "voc: missing: {root}/VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg: has no annotation, "
                "neither {root}/VOCdevkit/VOC2012/SegmentationClass/2007_000033.png nor "
                "{root}/VOCdevkit/VOC2012/SegmentationClassAug/2007_000033.png"
            ),
        ),
        (
            drop(f"{VOC}/ImageSets/Segmentation/val.txt"),
            ("voc: missing: {root}/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt: no such list of images"),
        ),
        (
            drop(f"{VOC}/ImageSets"),
            (
                "voc: laid out wrong: {root}/VOCdevkit: neither ADE20K (images/training, "
                "annotations/training, ...) nor VOC2012 (JPEGImages, SegmentationClass, "
                "ImageSets/Segmentation), Pascal Context (SegmentationClassContext) or COCO-Stuff "
                "(images/val2017, annotations/val2017); bring your own data into the layout of ADE20K"
            ),
        ),
        (drop("coco/val2017"), "coco: missing: {root}/coco/val2017: " + NOWHERE),
        (
            drop("coco/annotations/instances_val2017.json"),
            "coco: missing: {root}/coco/annotations/instances_val2017.json: " + NOWHERE,
        ),
        (
            drop("coco/val2017/000000000285.jpg"),
            (
                "coco: missing: {root}/coco/val2017: 1 of the 2 images of instances_val2017.json are not "
                "there: 000000000285.jpg"
            ),
        ),
        (
            lambda root: save_image(root / "coco/val2017/000000000285.jpg", (12, 16)),
            (
                "coco: laid out wrong: 000000000285.jpg is [12, 16] (height, width), and "
                "instances_val2017 says [16, 12]"
            ),
        ),
        (
            drop("llava/ocr_vqa/images/0198788.jpg"),
            (
                "llava instruct: missing: {root}/llava/ocr_vqa/images/0198788.jpg: no such image (1 of "
                "the 6 images of llava_v1_5_mix665k.json are not there, for 1 records); unpack the whole "
                "of them"
            ),
        ),
        (
            drop("llava/coco"),
            (
                "llava instruct: missing: {root}/llava/coco/train2017/000000033471.jpg: no such image (1 "
                "of the 6 images of llava_v1_5_mix665k.json are not there, for 2 records); unpack the "
                "whole of them"
            ),
        ),
        (
            edit(MIX, break_answers),
            (
                "llava instruct: laid out wrong: {root}/llava/llava_v1_5_mix665k.json: 1 of the 8 "
                "records of llava_v1_5_mix665k.json cannot be used and were left out; the first is "
                "record 2 (id 2): the answer in turn 1 is empty; mend or remove them"
            ),
        ),
        (
            edit(PRETRAIN, lambda data: data.append(record("blank", None))),
            (
                "llava pretrain: laid out wrong: "
                "{root}/llava/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json: 1 records have no image, the "
                "first has the id blank; the projector learns from images only, remove them"
            ),
        ),
        (drop(PRETRAIN), "llava pretrain: missing: {root}/" + PRETRAIN + ": " + NOWHERE),
        (
            drop("gqa/images/n161313.jpg"),
            (
                "gqa: missing: {root}/gqa/images: 1 of the 1 images of gqa testdev are not there, the "
                "first is n161313.jpg"
            ),
        ),
        (drop("gqa/images"), "gqa: missing: {root}/gqa/images: " + NOWHERE),
        (
            drop("textvqa/train_images/003a8ae2ef43b901.jpg"),
            (
                "textvqa: missing: {root}/textvqa/train_images: 1 of the 1 images of textvqa val are not "
                "there, the first is 003a8ae2ef43b901.jpg"
            ),
        ),
        (
            edit(
                "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", lambda data: data["data"][0].update(image_id="x")
            ),
            (
                "textvqa: laid out wrong: {root}/textvqa/TextVQA_Rosetta_OCR_v0.2_val.json: has no "
                "tokens for 1 images of TextVQA_0.5.1_val.json, the first is 003a8ae2ef43b901"
            ),
        ),
        (drop("scienceqa/pid_splits.json"), "sqa: missing: {root}/scienceqa/pid_splits.json: " + NOWHERE),
        (
            drop("scienceqa/images/test/4"),
            (
                "sqa: missing: {root}/scienceqa/images: 1 of the 1 images of scienceqa test are not "
                "there, the first is test/4/image.png"
            ),
        ),
        (
            drop("vqav2/val2014/COCO_val2014_000000262148.jpg"),
            (
                "vqav2: missing: {root}/vqav2/val2014: 1 of the 1 images of vqav2 val are not there, the "
                "first is COCO_val2014_000000262148.jpg"
            ),
        ),
        (
            edit(
                "vqav2/v2_mscoco_val2014_annotations.json",
                lambda data: data["annotations"][0].update(question_id=1),
            ),
            (
                "vqav2: laid out wrong: {root}/vqav2/v2_mscoco_val2014_annotations.json: 1 of the 1 "
                "questions have no annotation, the first is 262148000; give the annotations of these "
                "questions"
            ),
        ),
        (
            lambda root: (root / "weights/sam_vit_h.pth").write_bytes(b""),
            (
                "weights: laid out wrong: {root}/weights/sam_vit_h.pth: an empty file (1 of 1 are); "
                "fetch it again"
            ),
        ),
    ],
)
def test_one_thing_that_is_wrong_is_named(
    root: Path, change: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(root)
    assert main(["data", "--data-root", str(root), "--check"]) == 1
    out = capsys.readouterr().out
    assert below(out) == [said.format(root=root)]
    name, state = said.split(": ")[:2]
    states = {row: cells[2] for row, cells in table_of(out).items() if cells[2] not in ("absent", "state")}
    assert states == {**dict.fromkeys(HOLDS, "complete"), name: state}


@pytest.mark.parametrize(
    "name",
    [
        "coco/annotations/instances_val2017.json",
        MIX,
        PRETRAIN,
        "gqa/testdev_balanced_questions.json",
        "textvqa/TextVQA_0.5.1_val.json",
        "scienceqa/problems.json",
        "scienceqa/pid_splits.json",
        "vqav2/v2_mscoco_val2014_annotations.json",
    ],
)
def test_a_truncated_json_is_named(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut(name)(root)
    assert main(["data", "--data-root", str(root), "--check"]) == 1
    (line,) = below(capsys.readouterr().out)
    assert f": laid out wrong: {root}/{name}: is not JSON (" in line


def test_the_lists_of_sbd_are_checked_where_they_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = root / "VOCdevkit/VOC2012"
    (voc / "ImageSets/Segmentation/aug.txt").write_text("2008_000002\n")
    save_image(voc / "JPEGImages/2008_000002.jpg")
    save_labels(voc / "SegmentationClassAug/2008_000002.png", 20)
    assert main(["data", "--data-root", str(root), "--check"]) == 0
    out = capsys.readouterr().out
    assert table_of(out)["voc"][1] == "images with annotations: train 2, val 1, trainaug 3"
    assert "voc: VOC2012/trainaug has 3 images; VOC2012 has 10,582" in out.splitlines()
    (voc / "SegmentationClassAug/2008_000002.png").unlink()
    assert main(["data", "--data-root", str(root), "--check"]) == 1
    assert "voc: missing: " in capsys.readouterr().out


def test_a_language_model_is_a_whole_hugging_face_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "vicuna-7b-v1.5")
    command = ["data", "--data-root", str(tmp_path), "--check"]
    assert main(command) == 0
    assert table_of(capsys.readouterr().out)["language-model"][1:] == ["llama, 0.0 GB", "complete"]
    (tmp_path / "vicuna-7b-v1.5/model.safetensors").unlink()
    assert main(command) == 1
    (line,) = below(capsys.readouterr().out)
    assert line == (
        f"language-model: laid out wrong: {tmp_path}/vicuna-7b-v1.5: holds no weights; wanted "
        f"model.safetensors, or its parts and index"
    )


def test_a_set_whose_library_is_absent_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_json(tmp_path / "vicuna-7b-v1.5/config.json", {"model_type": "llama"})
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["data", "--data-root", str(tmp_path), "--check"]) == 1
    out = capsys.readouterr().out
    assert table_of(out)["language-model"][1:] == ["", "not checked"]
    (line,) = below(out)
    assert line == (
        'language-model: not checked: transformers is not installed; get it with: pip install "am-radio[vqa]"'
    )


def test_run_lengths_that_only_pycocotools_merges_are_not_called_wrong_without_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = {"size": [16, 12], "counts": [20, 10, 0, 10, 152]}
    name = "coco/annotations/instances_val2017.json"
    edit(name, lambda data: data["annotations"][0].update(segmentation=lengths))(root)
    command = ["data", "--data-root", str(root), "--check"]
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert main(command) == 1
    assert below(capsys.readouterr().out) == [
        'coco: not checked: pycocotools.mask is not installed; get it with: pip install "am-radio[sam]"'
    ]


def test_training_archives_that_are_not_unpacked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_train(root)
    assert main(["data", "--data-root", str(root), "--check"]) == 1
    lines = below(capsys.readouterr().out)
    assert lines[0] == (
        f"imagenet train: laid out wrong: {root}/imagenet/train: holds tar files: unpack each into the "
        f"folder of its class (val: as valprep.sh does)"
    )


def test_a_pattern_of_shards_and_those_that_are_absent_or_remote(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text(
        "laion: data/datacomp/shards/{00000000..00000001}.tar\n"
        "datacomp: data/datacomp/shards/{00000000..00000004}.tar\n"
        "imagenet-21k: https://host/{000..099}.tar\n"
    )
    assert main(["data", "--data-root", "data.yaml", "--check"]) == 1
    out = capsys.readouterr().out
    table = table_of(out)
    assert table["laion"][1:] == ["2 shards, 0.0 GB, 3 images in the first", "complete"]
    assert table["imagenet-21k"][1:] == ["100 remote shards", "not checked"]
    assert table["datacomp"][1:] == ["", "missing"]
    (line,) = below(out)
    assert line == (
        f"datacomp: missing: {root}/datacomp/shards/00000002.tar: no such shard (3 of 5 are absent); fetch "
        f"it, or mend the pattern"
    )
    assert main(["data"]) == 0
    table = table_of(capsys.readouterr().out)
    assert {table[name][2] for name in ("laion", "datacomp", "imagenet-21k")} == {"not checked"}


def test_the_evaluators_libraries_are_not_needed_for_a_list(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert main(["data", "--data-root", str(root)]) == 0
    assert evaluate(["data", "--data-root", "nosuch"]) == 2
    assert "error: nosuch: no such file or folder; give a data.yaml" in capsys.readouterr().err


MODEL = ["arch:vit-tiny12", "--out", "o", "--plain"]
FAST = [
    "--iterations",
    "2",
    "--crop",
    "24",
    "--train-batch-size",
    "2",
    "--save-maps",
    "0",
    "--preset",
    "dinov2",
]


def reports(folder: str = "o") -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*-*.json")}


def test_knn_takes_imagenet_from_the_root(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", *MODEL, "--data-root", str(root), "--k", "1"]) == 0
    (report,) = reports().values()
    assert [(used["role"], used["count"]) for used in report["data"]] == [("bank", 6), ("query", 3)]
    assert report["settings"]["bank"] == f"{root}/imagenet/train"
    assert report["settings"]["data_root"] == str(root)
    assert "data_root" in report["machine_settings"]  # it says nothing about the protocol
    same = ["--bank", f"{root}/imagenet/train", "--query", f"{root}/imagenet/val"]
    assert main(["knn", *MODEL, *same, "--out", "same", "--k", "1"]) == 0
    (named,) = reports("same").values()
    assert named["metrics"] == report["metrics"] and named["data"] == report["data"]
    assert main(["knn", *MODEL, *same, "--data-root", "data", "--out", "both", "--k", "1"]) == 0
    assert reports("both")["knn-vit-tiny12-untrained"]["data"] == report["data"]


def test_seg_gives_a_report_and_a_table_for_each_set(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seg", *MODEL, *FAST, "--data-root", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count(" miou ") == 2
    written = reports()
    assert sorted(written) == ["seg-vit-tiny12-untrained", "seg-vit-tiny12-untrained-voc"]
    ade, voc = written["seg-vit-tiny12-untrained"], written["seg-vit-tiny12-untrained-voc"]
    assert [used["name"] for used in ade["data"]] == [
        "ADEChallengeData2016/training",
        "ADEChallengeData2016/validation",
    ]
    assert [used["name"] for used in voc["data"]] == ["VOC2012/train", "VOC2012/val"]
    shutil.rmtree(root / "ADEChallengeData2016")
    assert main(["seg", *MODEL, *FAST, "--data-root", str(root), "--out", "voc"]) == 0
    assert list(reports("voc")) == ["seg-vit-tiny12-untrained-voc"]


def test_all_runs_what_is_there_and_names_what_is_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "coco")
    shutil.rmtree(root / "lvis")
    shutil.rmtree(root / "llava")
    shutil.rmtree(root / "nyu")  # its images are not of NYU's size
    fast = [f"--seg.{option[2:]}" if option.startswith("--") else option for option in FAST]
    command = ["all", *MODEL, *fast, "--data-root", str(root), "--knn.k", "1", "--maps.num-images", "2"]
    command += ["--resolution.sides", "48", "96", "--resolution.knn.k", "1", "--dense-knn.size", "48"]
    assert main(command) == 0
    done = capsys.readouterr()
    assert done.err.splitlines() == [
        f"left out: correspondence: {root} has not spair, which it is scored on; name it there",
        f"left out: depth: {root} has not nyu, which it is scored on; name it there",
        f"left out: retrieval: {root} has not roxford5k or rparis6k, which it is scored on; name it there",
        f"left out: sam: {root} has not coco or lvis, which it is scored on; name it there",
        f"left out: vqa: {root} has not llava, which it is scored on; name it there",
    ]
    jobs = ("knn on imagenet", "linear on imagenet", "maps on imagenet", "resolution on imagenet")
    jobs += ("seg on ade20k", "seg on voc", "dense-knn on ade20k", "dense-knn on voc")
    for job in jobs:
        assert f"vit-tiny12-untrained: {job}: running" in done.out
    assert "zeroshot on imagenet: left out: vit-tiny12 has no text tower" in done.out
    assert "open-vocab on ade20k: left out: vit-tiny12 has no text tower" in done.out
    assert "fidelity on imagenet: left out: vit-tiny12 has no adaptors" in done.out
    tasks = {name.partition("-vit")[0] for name in reports()}
    assert tasks == {"dense-knn", "knn", "linear", "maps", "resolution", "seg"} and len(reports()) == 8
    assert not any("scenes:" in used["name"] for report in reports().values() for used in report["data"])
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(f"{job}: unchanged, kept" in out for job in ("knn on imagenet", "seg on ade20k", "seg on voc"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sam"], "sam: data.yaml has not coco or lvis, which it is scored on; name it there"),
        (
            ["all", "--tasks", "knn", "sam"],
            "sam: data.yaml has not coco or lvis, which it is scored on; name it there",
        ),
        (
            ["all", "--tasks", "seg", "--seg.voc-split", "train"],
            "seg: data.yaml has not voc, which it is scored on",
        ),
        (["noise", "--tasks", "sam"], "sam: data.yaml has not coco or lvis"),
        (["knn"], "nowhere/train: no such folder"),
    ],
)
def test_a_task_whose_data_are_not_there_does_not_fall_back(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text("imagenet: nowhere\nade20k: nowhere\n")
    command, *rest = arguments
    assert evaluate([command, *MODEL, *rest, "--data-root", "data.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert reports() == {}


def test_a_root_without_any_tasks_data_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text("laion: shards\n")
    assert evaluate(["all", *MODEL, "--data-root", "data.yaml"]) == 2
    assert (
        "error: data.yaml: has no data set that a task is scored on; name one there"
        in capsys.readouterr().err
    )


def test_vqa_trains_on_llavas_data_and_scores_every_benchmark_that_is_there(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "vqav2")
    small = ["--language-model", "tiny", "--preset", "scenes", "--max-steps", "1"]
    assert main(["vqa", *MODEL, *small, "--data-root", str(root)]) == 0
    (report,) = reports().values()
    assert [(used["name"], used["count"]) for used in report["data"]] == [
        ("blip_laion_cc_sbu_558k.json", 2),
        ("llava_v1_5_mix665k.json", 8),
        ("gqa testdev", 2),
        ("textvqa val", 1),
        ("scienceqa test", 1),
        ("pope coco", 3),
    ]
    assert {"accuracy", "gqa", "textvqa", "scienceqa", "pope", "pope_f1_popular"} <= set(report["metrics"])
    assert report["settings"]["benchmarks"]["gqa"]["images"] == f"{root}/gqa/images"
    capsys.readouterr()
    assert evaluate(["vqa", *MODEL, *small, "--data-root", str(root), "--task", "vqav2"]) == 2
    assert f"vqa: {root} has not vqav2, which it is scored on; name it there" in capsys.readouterr().err
