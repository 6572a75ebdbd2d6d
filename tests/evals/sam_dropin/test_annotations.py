"""Files from others: the right value, or one error that names the record."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image
from pycocotools import mask as library

from evals.sam_dropin.annotations import read_instances, read_results
from evals.sam_dropin.data import Instances, open_instances, run_lengths
from radio.errors import DataError
from radio.scenes.export import compress

Change = Callable[[Callable[[Any], Any]], None]


def opened(world: tuple[Path, Path], **changes: Any) -> Instances:
    given: dict[str, Any] = {"limit": None, "crowds": True, "smallest_area": 0.0, "memo": None}
    return open_instances(*world, **{**given, **changes})


def set_each(kind: str, key: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for record in data[kind]:
            record[key] = value(record[key])

    return edit


def set_one(kind: str, place: int, **values: Any) -> Callable[[Any], None]:
    return lambda data: data[kind][place].update(values)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            set_each("annotations", "id", lambda number: min(number, 2)),
            r"annotation id 2 stands 8 times \(8 of 9 annotations share an id\); give each its own",
        ),
        (set_one("images", 3, id=1), r"image id 1 stands 2 times \(2 of 5 images share an id\)"),
        (set_one("categories", 2, id=1), r"category id 1 stands 2 times \(2 of 3 categories share an id\)"),
        (
            set_one("annotations", 2, category_id=0),
            r"annotation 3 is of category 0, which the file does not list \(1 of 9 annotations\)",
        ),
        (
            set_each("annotations", "image_id", lambda number: 10 * number),
            r"annotation 1 is of image 10, which the file does not list \(9 of 9 annotations\)",
        ),
        (lambda data: data["categories"][0].pop("name"), r"categories\[0\]\.name: field required"),
        (set_each("annotations", "id", str), r"annotations\[0\]\.id: wanted a number, and this is a text"),
        (set_each("images", "id", str), r"images\[0\]\.id: wanted a number, and this is a text"),
        (set_one("annotations", 4, id=True), r"annotations\[4\]\.id: input should be a valid integer"),
        (set_one("annotations", 4, id=1.5), r"annotations\[4\]\.id: input should be a valid integer"),
        (set_one("annotations", 4, id=10**19), r"annotations\[4\]\.id: input should be less than"),
        (set_one("annotations", 4, iscrowd=2), r"annotations\[4\]\.iscrowd: .* less than or equal to 1"),
        (set_one("annotations", 4, iscrowd=True), r"annotations\[4\]\.iscrowd: .* valid integer"),
        (
            set_one("annotations", 4, iscrowd="1"),
            r"annotations\[4\]\.iscrowd: wanted a number, and .* a text",
        ),
        (set_one("annotations", 4, area=-1), r"annotations\[4\]\.area: .* greater than or equal to 0"),
        (set_one("annotations", 4, area=True), r"annotations\[4\]\.area: input should be a valid number"),
        (set_one("annotations", 4, bbox=[0, 0, -3, 5]), "annotation 5 has a box -3 wide and 5 high"),
        (set_one("annotations", 4, bbox=[0, 0, 1e6, 5]), r"annotations\[4\]\.bbox\[2\]: .* less than or"),
        (set_one("annotations", 4, bbox=[0, 0, 3, 5, 0.9]), r"annotations\[4\]\.bbox: list should have at"),
        (set_one("images", 1, height=0), r"images\[1\]\.height: .* greater than or equal to 1"),
        (set_one("images", 1, height=10**15), r"images\[1\]\.height: .* less than or equal to 65535"),
        (set_one("images", 1, height="90"), r"images\[1\]\.height: wanted a number, and this is a text"),
        (
            set_one("images", 1, height=60_000, width=60_000),
            "image 2 has 60000x60000 = 3600000000 px, and the",
        ),
        (set_one("images", 1, file_name=5), r"images\[1\]\.file_name: .* valid string"),
        (lambda data: data["images"][0].pop("file_name"), r"images\[0\]\.file_name: field required"),
        (set_one("images", 3, file_name="2.png"), r"images 2 and 4 are one file, 2\.png; list it once"),
        (set_one("images", 3, file_name="./2.png"), r"images 2 and 4 are one file, 2\.png"),
    ],
)
def test_what_does_not_fit_is_one_error(
    world: tuple[Path, Path], change: Change, how: Any, said: str
) -> None:
    change(how)
    with pytest.raises(DataError, match=said):
        opened(world)


def test_a_file_under_two_forms_of_its_name_counts_once(world: tuple[Path, Path], change: Change) -> None:
    (world[1] / "1.png").rename(world[1] / unicodedata.normalize("NFC", "é.png"))
    (world[1] / "2.png").unlink()
    for place, form in enumerate(("NFC", "NFD")):
        change(set_one("images", place, file_name=unicodedata.normalize(form, "é.png")))
    with pytest.raises(DataError, match=r"images 1 and 2 are one file, .*é\.png; list it once, with the"):
        opened(world)


def as_lvis(data: Any) -> None:
    """Name the images as LVIS does, by their address, and the categories that they were searched for."""
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
        image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [1] if image["id"] == 1 else []}
    for category, mark in zip(data["categories"], "frc", strict=True):
        category["frequency"] = mark


def test_a_file_of_lvis_is_read(world: tuple[Path, Path], change: Change) -> None:
    change(as_lvis)
    data = opened((world[0], world[1].parent))
    assert data.is_lvis and data.frequencies == {1: "f", 2: "r", 3: "c"}
    assert [image.name for image in data.images][:2] == ["images/1.png", "images/2.png"]
    assert data.annotated[5].searched == {2} and data.annotated[1].searched == {1, 2}
    assert data.annotated[1].not_exhaustive == {1} and not data.annotated[2].not_exhaustive


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda data: data["images"][1].pop("neg_category_ids"), "4 of 5 images have neg_category_ids"),
        (
            set_one("images", 1, neg_category_ids=[2, 7]),
            "image 2 has neg_category_ids 7, which the file does",
        ),
        (
            set_one("images", 1, neg_category_ids=["a"]),
            r"images\[1\]\.neg_category_ids\[0\]: wanted a number",
        ),
        (lambda data: data["images"][1].pop("coco_url"), r"images\[1\]\.file_name: field required"),
    ],
)
def test_a_damaged_file_of_lvis_is_one_error(
    world: tuple[Path, Path], change: Change, how: Any, said: str
) -> None:
    change(as_lvis)
    change(how)
    with pytest.raises(DataError, match=said):
        opened((world[0], world[1].parent))


@pytest.mark.parametrize(
    ("place", "segmentation", "said"),
    [
        (
            3,
            [[0, 0, 1e8, 0, 1e8, 1e8]],
            "annotation 4 has a polygon with a point that lies more than 100000 px",
        ),
        (3, [[0, 0, -1e9, 0, 5, 5]], "annotation 4 has a polygon with a point that lies more than 100000 px"),
        (3, [[0, 0, True, 0, 5, 5]], "annotation 4 has a polygon that is not three or more points"),
        (3, [[5, 5, 9, 9, 5]], "annotation 4 has a polygon that is not three or more points"),
        (3, [[5, 5, 9, 9, 5, 9], [1, 2]], "annotation 4 has a polygon that is not three or more points"),
        (3, [[0, 0, 1e5, 1e5] * 100], "annotation 4 has a polygon 20000000 px around, and the limit"),
        (4, {"size": [90, 50], "counts": [4600, -100]}, "annotation 5 has a run length of -100"),
        (
            4,
            {"size": [90, 50], "counts": [True, 4499]},
            "annotation 5 has run lengths that are not all whole",
        ),
        (4, {"size": [90, 50], "counts": [4.5, 4495.5]}, "annotation 5 has run lengths that are not all"),
        (
            4,
            {"size": [90, 50], "counts": [10**15]},
            "annotation 5 has run lengths of 1000000000000000 pixels",
        ),
        (4, {"size": [90, 50], "counts": []}, "annotation 5 has run lengths of 0 pixels"),
        (
            4,
            {"size": [90, 50], "counts": compress([4000])},
            "annotation 5 has run lengths of 4000 pixels, and",
        ),
        (
            4,
            {"size": [90, 50], "counts": compress([4500])[:-1]},
            "annotation 5 has run lengths that are .* cut",
        ),
        (4, {"size": [90, 50], "counts": "é"}, "annotation 5 has run lengths that are no compressed text"),
        (4, {"size": [90, 50], "counts": "o" * 99 + "0"}, "that hold a number of more than 30 bits"),
        (4, {"size": [90, 50], "counts": compress([4600, -100])}, "annotation 5 has a run length of -100"),
    ],
)
def test_no_segmentation_reaches_pycocotools_unchecked(
    world: tuple[Path, Path], change: Change, place: int, segmentation: Any, said: str
) -> None:
    change(set_one("annotations", place, segmentation=segmentation))
    with pytest.raises(DataError, match=said):
        opened(world)


def test_a_number_without_a_fraction_is_whole(world: tuple[Path, Path], change: Change) -> None:
    before = read_instances(world[0])
    for key in ("id", "image_id", "category_id", "iscrowd"):
        change(set_each("annotations", key, float))
    change(set_each("images", "id", float))
    assert read_instances(world[0])[:2] == before[:2]


def test_an_absent_flag_is_no_crowd(world: tuple[Path, Path], change: Change) -> None:
    change(lambda data: [annotation.pop("iscrowd") for annotation in data["annotations"]])
    assert not any(i.crowd for image in opened(world).images for i in image.instances)


def test_empty_runs_between_others_change_no_overlap(world: tuple[Path, Path], change: Change) -> None:
    """Of two masks that begin with empty runs pycocotools takes the overlap for empty."""
    mask = np.zeros((90, 50), dtype=bool)
    mask[:, 10:20] = True
    plain, odd = [900, 900, 2700], [0, 0, 450, 0, 450, 900, 2700]
    found = []
    for counts in (plain, odd, compress(odd)):
        lengths = {"size": [90, 50], "counts": counts}
        change(set_one("annotations", 4, segmentation=lengths))
        data = opened(world)
        image = data.images[1]
        assert np.array_equal(data.masks(image)[1].numpy(), mask)
        found.append(run_lengths(image.instances[1], image.size)["counts"])
    encoded = library.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert [c if isinstance(c, bytes) else c.encode() for c in found] == [encoded] * 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(world: tuple[Path, Path], encoding: str) -> None:
    before = read_instances(world[0])
    world[0].write_text(world[0].read_text(), encoding=encoding)
    assert read_instances(world[0])[:2] == before[:2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff\xd8\xff\xe0", "is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b'{"images": [], "annotations": NaN, "categories": []}', "holds NaN"),
        (b"[]", "not COCO instances: .*dictionary"),
        (b"null", "not COCO instances: .*dictionary"),
    ],
)
def test_content_that_is_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_instances(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for read in (read_instances, read_results):
        with pytest.raises(DataError, match="is a folder"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"score": "0.9"}, r"\[1\]\.score: input should be a valid number, got '0.9'"),
        ({"score": True}, r"\[1\]\.score: input should be a valid number"),
        ({"score": 1e999}, r"holds Infinity|finite"),
        ({"image_id": "1"}, r"\[1\]\.image_id: wanted a number, and this is a text"),
        ({"bbox": [1, 2, None, 4]}, r"\[1\]\.bbox\[2\]: input should be a valid number"),
        ({"bbox": [9, 9, -3, 5]}, r"entry 1 has a box -3 wide and 5 high; .* \(1 of 2 entries\)"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([good, {**good, **entry}]))
    with pytest.raises(DataError, match=said):
        read_results(path)


def test_boxes_of_other_conventions_are_said(world: tuple[Path, Path], change: Change) -> None:
    change(set_one("annotations", 5, bbox=[5, 5, 30, 30], segmentation=[[5, 5, 35, 5, 35, 35]]))
    change(set_one("annotations", 6, bbox=[5, 5, 30, 30]))
    assert opened(world).notes == ()
    data = json.loads(world[0].read_text())
    for annotation in data["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    world[0].write_text(json.dumps(data))
    (note,) = opened(world).notes
    assert "of 9 boxes reach more than 2 px beyond their image; COCO's are x, y, width and height" in note
    sizes = {image["id"]: (image["width"], image["height"]) * 2 for image in data["images"]}
    for annotation in data["annotations"]:
        sides = zip(annotation["bbox"], sizes[annotation["image_id"]], strict=True)
        annotation["bbox"] = [value / side / 2 for value, side in sides]
    world[0].write_text(json.dumps(data))
    (note,) = opened(world).notes
    assert note == "all 9 boxes lie within the first pixel; COCO's are in pixels, not shares of a side"


def test_names_match_whatever_the_form_of_their_accents(world: tuple[Path, Path], change: Change) -> None:
    for number, (stored, named) in enumerate((("NFC", "NFD"), ("NFD", "NFC")), start=1):
        folder = world[1] / unicodedata.normalize(stored, f"été{number}")
        folder.mkdir()
        (world[1] / f"{number}.png").rename(folder / unicodedata.normalize(stored, "é.png"))
        name = unicodedata.normalize(named, f"été{number}/é.png")
        change(set_one("images", number - 1, file_name=name))
    data = opened(world)
    assert [tuple(data.read(image).shape[1:]) for image in data.images] == [
        image.size for image in data.images
    ]


def test_two_files_that_read_alike_are_not_chosen_from(world: tuple[Path, Path], change: Change) -> None:
    for form in ("NFC", "NFKD"):  # neither is the name itself: its accent comes before the cedilla
        (world[1] / unicodedata.normalize(form, "ḉ.png")).write_bytes((world[1] / "1.png").read_bytes())
    change(set_one("images", 0, file_name="ć\u0327.png"))
    with pytest.raises(DataError, match=r"1 of the 4 images of .* are not there"):
        opened(world)


def test_a_name_that_no_system_takes(world: tuple[Path, Path], change: Change) -> None:
    for name in ("x" * 4000, "a\0b", "1.png/2.png"):
        change(set_one("images", 0, file_name=name))
        with pytest.raises(DataError, match=r"1 of the 4 images of .* are not there"):
            opened(world)


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_an_orientation_that_is_not_applied_is_said(
    world: tuple[Path, Path], change: Change, ending: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in (2, 3):  # 90 x 50, and a square
        with Image.open(world[1] / f"{number}.png") as image:
            size = image.size if number == 3 else image.size[::-1]
            image.resize(size).save(world[1] / f"turned{number}.{ending}", exif=exif)
    change(set_one("images", 2, file_name=f"turned3.{ending}"))
    note = opened(world).notes[0]
    assert note.startswith("1 of 4 images has an EXIF orientation that is not applied; are the annotations")
    change(set_one("images", 1, file_name=f"turned2.{ending}"))
    with pytest.raises(
        DataError,
        match=rf"turned2\.{ending} is \[50, 90\] \(height, width\), and instances says \[90, 50\]; "
        "2 of 4 images have an EXIF orientation that is not applied: write it into the pixels",
    ):
        opened(world)


def test_damaged_images_are_told_before_the_work(world: tuple[Path, Path]) -> None:
    (world[1] / "3.png").write_bytes(b"nothing")
    (world[1] / "4.png").write_bytes((world[1] / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"3\.png: not an image.*\(2 of 4 images are bad\)"):
        opened(world)


EFFORT = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_masks(data: Instances) -> None:
    for image in data.images:
        masks = data.masks(image)
        assert masks.shape == (len(image.instances), *image.size)
        assert masks.equal(data.masks(image))


ODD = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-2, 100)
    | strategies.integers()
    | strategies.floats()
    | strategies.text(max_size=5)
    | strategies.lists(strategies.floats(-1e9, 1e9) | strategies.integers(0, 9999), max_size=8)
    | strategies.lists(strategies.lists(strategies.floats(-200, 2e5), max_size=9), max_size=3)
    | strategies.fixed_dictionaries(
        {
            "size": strategies.just([90, 50]) | strategies.lists(strategies.integers(), max_size=3),
            "counts": strategies.text("0123456789:;PQabno", max_size=9)
            | strategies.lists(strategies.integers(-5, 4500), max_size=6),
        }
    )
)
KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "height", "width", "name")


@EFFORT
@given(
    kind=strategies.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]),
    place=strategies.integers(0, 8),
    key=strategies.sampled_from(KEYS),
    value=ODD,
)
def test_any_change_is_the_right_mask_or_one_error(
    world: tuple[Path, Path], kind: str, place: int, key: str, value: Any
) -> None:
    """What passes decodes to masks of the image's size, the same twice."""
    data = json.loads(world[0].read_text())
    data[kind][place % len(data[kind])][key] = value
    path = world[0].with_name("changed.json")
    path.write_text(json.dumps(data))
    try:
        taken = opened((path, world[1]))
    except DataError as error:
        said = str(error)
    else:
        check_masks(taken)
        return
    assert len(said.splitlines()) == 1 and len(said) < 600


@EFFORT
@given(content=strategies.binary(max_size=30) | strategies.text(max_size=30).map(str.encode))
def test_any_bytes_are_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    for read in (read_instances, read_results):
        try:
            read(path)
        except DataError:
            continue
        assert json.loads(content) == []  # results without an entry


@EFFORT
@given(key=strategies.sampled_from(["image_id", "category_id", "bbox", "score"]), value=ODD)
def test_any_entry_is_a_box_or_one_error(tmp_path: Path, key: str, value: Any) -> None:
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([good, {**good, key: value}]))
    try:
        rows, _ = read_results(path)
    except DataError as error:
        said = str(error)
    else:
        x0, y0, x1, y1 = rows[1].instance.box
        assert x0 <= x1 and y0 <= y1 and abs(rows[1].score) < float("inf")
        return
    assert len(said.splitlines()) == 1 and len(said) < 600


@pytest.mark.parametrize("kind", ["polygon", "runs"])
def test_masks_without_a_pixel_are_said(world: tuple[Path, Path], change: Change, kind: str) -> None:
    assert opened(world).notes[-1].startswith("1 of 9 annotations have no pixel inside their image")
    outside = [[900, 900, 950, 900, 950, 950], [-9, 0, -5, 0, -5, 9]]
    height, width = opened(world).annotated[1].size
    runs = {"size": [height, width], "counts": [height * width]}
    change(set_one("annotations", 2, segmentation=outside if kind == "polygon" else runs))
    masks = opened(world)
    assert masks.notes[-1].startswith("2 of 9 annotations have no pixel inside their image and score 0")
    assert masks.notes[-1].endswith("the first is annotation 3")
    planes = [plane for image in masks.images for plane in masks.masks(image)]
    assert sum(not plane.any() for plane in planes) == 2


def test_boxes_that_hold_nothing_are_said(world: tuple[Path, Path], change: Change) -> None:
    before = opened(world).notes
    change(set_one("annotations", 0, bbox=[1, 1, 0, 3]))
    change(set_one("annotations", 1, bbox=[-9, 1, 4, 3]))
    assert "1 of 9 boxes have no width or no height" in before
    new = set(opened(world).notes) - set(before)
    assert new == {"2 of 9 boxes have no width or no height", "1 of 9 boxes lie wholly outside their image"}


@pytest.mark.parametrize("size", [["8", "9"], [[1] * 9999, 9], [True, None]])
def test_a_size_that_is_none_is_told_briefly(world: tuple[Path, Path], change: Change, size: Any) -> None:
    change(set_one("annotations", 2, segmentation={"size": size, "counts": [72]}))
    with pytest.raises(
        DataError, match=r"annotation 3 has a segmentation of size .*; wanted two numbers"
    ) as told:
        read_instances(world[0])
    assert len(str(told.value)) < 400


def test_a_key_twice_drops_no_annotations(world: tuple[Path, Path]) -> None:
    text = world[0].read_text().rstrip()
    world[0].write_text(text[:-1] + ', "annotations": []}')
    with pytest.raises(DataError, match="it holds the key 'annotations' twice in one object"):
        read_instances(world[0])
