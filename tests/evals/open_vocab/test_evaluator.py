from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, multiprocessing

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.open_vocab import OpenVocabSettings, evaluator
from evals.open_vocab.evaluator import (
    Crops,
    average_crops,
    choose_crops,
    choose_head,
    label_pixels,
    make_encoder,
    missing_requirements,
    name_classes,
    starts,
)
from evals.seg_probe.classes import COCO_STUFF, KNOWN_CLASSES
from evals.seg_probe.data import VOID, Labelling, read_image, read_labels
from evals.seg_probe.layouts import open_dataset
from evals.zeroshot.texts import TextHead
from radio.dist import joined
from radio.errors import ConfigError, DataError, RadioError, SizeError
from radio.images import resize
from radio.model import ModelConfig, build
from radio.students import StudentOptions, ViTOptions
from radio.types import Features

HUES = {"red": (230, 40, 40), "green": (40, 220, 60), "blue": (50, 60, 230), "yellow": (240, 230, 40)}


class Hues:
    """A text tower whose vectors are the tokens of patches in the colour that a text names last."""

    fingerprint = "hues"

    def __init__(self, takes_tokens: bool = True) -> None:
        self.takes_tokens = takes_tokens

    def encode(self, texts: Sequence[str]) -> Tensor:
        plain = torch.tensor([HUES[text.split()[-1].strip(".")] for text in texts]) / 255
        return torch.cat([plain, plain.square()], dim=1)

    def project(self, summaries: Tensor) -> Tensor:
        return summaries


def speaking(patches: Callable[..., Any]) -> Any:
    """A teacher whose tokens are in the space of its texts."""
    model = patches()
    model.text = Hues()
    return model


def run(model: Any, settings: OpenVocabSettings, out: Path, **changes: Any) -> Report:
    """Evaluate on the CPU, with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **changes})
    return run_evaluator(make_evaluator("open-vocab"), model, settings, out, run=shared)


@pytest.fixture
def settings(tmp_path: Path, make_ade: Callable) -> OpenVocabSettings:
    root, templates = make_ade(tmp_path / "mine", sizes=((40, 56), (56, 40))), tmp_path / "templates.txt"
    templates.write_text("a {}\nthis is {}\n")
    return OpenVocabSettings(data=root, short_side=56, crop=42, templates=str(templates), save_maps=0)


def areas_of(out: Path) -> list[Any]:
    lines = (out / "open-vocab-patches14.jsonl").read_text().splitlines()
    return [json.loads(line)["areas"] for line in lines]


def values(report: Report) -> list[float]:
    return [metric.value for metric in report.metrics.values()]


def areas_by_loop(model: Any, root: Path, columns: Tensor) -> list[Any]:
    """Crops of 42 px every 21 px, added up one after another."""
    data, lines = open_dataset(root, voc_split=None, known=KNOWN_CLASSES), []
    for pair in data.val.pairs:
        labels, image = read_labels(pair.labels, data.labelling), read_image(pair)
        height, width = image.shape[1:]
        image = resize(image, (56, 56 * width // height) if height < width else (56 * height // width, 56))
        height, width = image.shape[1:]
        total, count = np.zeros((3, height, width)), np.zeros((height, width))
        for top in [0, 14] if height == 56 else [0, 21, 36]:
            for left in [0, 14] if width == 56 else [0, 21, 36]:
                tokens = model(image[None, :, top : top + 42, left : left + 42]).tokens[0]
                cosines = (F.normalize(tokens, dim=1) @ columns).T.reshape(1, 3, 3, 3)
                large = F.interpolate(cosines, (42, 42), mode="bilinear")[0].numpy()
                total[:, top : top + 42, left : left + 42] += large
                count[top : top + 42, left : left + 42] += 1
        mean = torch.from_numpy(total / count)[None]
        classes = F.interpolate(mean, labels.shape, mode="bilinear")[0].argmax(dim=0).numpy()
        line = []
        for number in range(3):
            seen, there = (classes == number) & (labels != VOID), labels == number
            if seen.any() or there.any():
                line.append([number, int((seen & there).sum()), int(seen.sum()), int(there.sum())])
        lines.append(line)
    return lines


def test_areas_are_those_of_a_slow_loop(
    tmp_path: Path, settings: OpenVocabSettings, patches: Callable
) -> None:
    report = run(speaking(patches), settings, tmp_path / "out")
    columns = F.normalize(Hues().encode(["red", "green", "blue"]), dim=1).T
    expected = areas_by_loop(patches(), settings.data, columns)
    for found, line in zip(areas_of(tmp_path / "out"), expected, strict=True):
        np.testing.assert_allclose(found, line, atol=1)  # a pixel where two cosines are equal
    assert 80 < report.metrics["miou"].value < 100
    resolved = report.settings["resolved"]
    assert (resolved["crop"], resolved["stride"], resolved["short_side"]) == ([42, 42], 21, 56)
    assert (resolved["features"], resolved["templates"]) == ("own tokens", 2)


def test_crops_are_averaged_as_by_mmsegmentation() -> None:
    from evals.seg_probe.evaluator import load_plugin

    load_plugin()
    from mmengine.config import ConfigDict
    from mmseg.models import EncoderDecoder

    image = torch.rand(3, 46, 61, generator=torch.Generator().manual_seed(0))

    def encode(crops: Tensor) -> Tensor:  # not the same wherever a crop lies
        ramp = torch.linspace(0, 1, 4).view(1, 1, 1, 4)
        return F.avg_pool2d(crops, 5) + ramp

    theirs = SimpleNamespace(
        test_cfg=ConfigDict(stride=(9, 9), crop_size=(20, 20)),
        out_channels=3,
        encode_decode=lambda crop, _: F.interpolate(encode(crop), (20, 20), mode="bilinear"),
    )
    expected = EncoderDecoder.slide_inference(theirs, image[None], [{}])[0]
    for batch in (1, 4, 100):
        found = average_crops(image, Crops((20, 20), 9, 46), encode, batch)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_crop_is_the_whole_image() -> None:
    image = torch.rand(3, 20, 20)
    found = average_crops(image, Crops((20, 20), 10, 20), lambda x: F.avg_pool2d(x, 5), 4)
    direct = F.interpolate(F.avg_pool2d(image[None], 5), (20, 20), mode="bilinear")[0]
    assert torch.equal(found, direct)
    assert [starts(20, 20, 10), starts(10, 4, 3), starts(11, 4, 3)] == [[0], [0, 3, 6], [0, 3, 6, 7]]


def test_a_pixel_of_no_class_is_background() -> None:
    cosines = torch.tensor([[0.30, 0.25, 0.2], [0.28, 0.25, 0.1]]).view(2, 1, 3)
    assert label_pixels(cosines, 0, None, 0.01).tolist() == [[0, 0, 0]]  # of equal ones the first
    assert label_pixels(cosines, 1, None, 0.01).tolist() == [[1, 1, 1]]
    # probabilities 1 / (1 + exp(-2)) = 0.881, 0.5, 1 / (1 + exp(-10))
    assert label_pixels(cosines, 1, 0.88, 0.01).tolist() == [[1, 0, 1]]
    assert label_pixels(cosines, 1, 0.89, 0.01).tolist() == [[0, 0, 1]]
    assert label_pixels(cosines, 1, 0.89, 0.005).tolist() == [[1, 0, 1]]


class Turned:
    """An adaptor: tokens and summaries through maps of their own."""

    def __call__(self, features: Features, grid: Any = None) -> Features:
        return Features(self.adapt_summary(features.summary), 2 * features.tokens[..., :4], features.grid)

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        return summaries.view(len(summaries), 2, -1).sum(dim=1)[:, :3] + 1


def test_a_students_tokens_pass_through_a_head_of_its_adaptor(patches: Callable) -> None:
    model = patches()
    model.summary_dim, model.summary_tokens, model.adaptors = 12, 2, {"clip": Turned()}
    text = TextHead("scenes:clip", Hues(), "clip")
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    images, columns = torch.rand(2, 3, 28, 42), F.normalize(torch.rand(3, 5), dim=0)
    found = make_encoder(model, text, "summary", run)(images, columns)
    tokens = model(images).tokens
    for image in range(2):
        for place in range(6):
            vector = 2 * tokens[image, place, :3] + 1  # each token stands for both class tokens
            expected = F.cosine_similarity(vector[:, None], columns, dim=0)
            torch.testing.assert_close(found[image, :, place // 3, place % 3], expected)
    wide = F.normalize(torch.rand(4, 5), dim=0)
    spatial = make_encoder(model, text, "spatial", run)(images, wide)
    torch.testing.assert_close(spatial.flatten(2).transpose(1, 2), F.normalize(tokens[..., :4], dim=2) @ wide)
    assert choose_head(model, text, None) == "summary"
    assert choose_head(model, text, "spatial") == "spatial"
    with pytest.raises(ConfigError, match=r"tokens of hf:siglip are not in .*; give --head summary"):
        choose_head(model, TextHead("hf:siglip", Hues(takes_tokens=False), "clip"), "spatial")
    model.summary_tokens = 0  # though the widths would fit
    with pytest.raises(ConfigError, match="give --head spatial"):
        choose_head(model, text, None)
    with pytest.raises(ConfigError, match="nor does hf:siglip compare its tokens with texts"):
        choose_head(model, TextHead("hf:siglip", Hues(takes_tokens=False), "clip"), None)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit-tiny12", ViTOptions(), 1),
        ("vit-tiny12", ViTOptions(class_tokens=0), 1),
        ("vit-tiny12", ViTOptions(class_tokens=3), 3),
        ("e-radio-tiny", StudentOptions(), 0),
        ("e-radio-tiny-noup", StudentOptions(), 1),
    ],
)
def test_students_declare_the_vectors_of_their_summary(
    name: str, options: StudentOptions, count: int
) -> None:
    assert build(ModelConfig(student=name, options=options), 0).summary_tokens == count


@pytest.mark.parametrize(("summary", "tokens", "lack"), [(0, True, ""), (1, False, ""), (0, False, "a neck")])
def test_a_student_is_left_out_where_neither_head_fits(
    patches: Callable, monkeypatch: pytest.MonkeyPatch, summary: int, tokens: bool, lack: str
) -> None:
    model = patches()
    model.summary_tokens = summary
    text = TextHead("scenes:clip", Hues(tokens), "clip")
    monkeypatch.setattr(evaluator, "find_text_tower", lambda _: text)
    found = missing_requirements(model)
    assert lack in found and bool(found) == bool(lack)


def test_what_a_model_lacks_is_said(patches: Callable) -> None:
    assert "no text tower" in missing_requirements(patches())
    model = speaking(patches)
    assert missing_requirements(model) == ""
    with pytest.raises(ConfigError, match="leave --head summary out"):
        choose_head(model, TextHead(model.name, model.text, None), "summary")
    model.text = Hues(takes_tokens=False)  # SigLIP's: before the pooling, though of the summary's width
    assert missing_requirements(model).startswith("the tokens of patches14 are not in the space of its texts")
    del model.text.takes_tokens  # another package's
    assert missing_requirements(model).startswith("the tokens of patches14 are not in the space of its texts")


def test_crops_are_of_sizes_that_the_model_takes(patches: Callable) -> None:
    data, model = Path("x"), patches()  # 56 px, patch 14
    assert choose_crops(model, OpenVocabSettings(data=data)) == ((56, 56), 28, 448)
    assert choose_crops(model, OpenVocabSettings(data=data, crop=60, stride=56)) == ((56, 56), 56, 448)
    assert choose_crops(model, OpenVocabSettings(data=data, short_side=30)) == ((28, 28), 14, 30)
    assert choose_crops(model, OpenVocabSettings(data=data, short_side=30, crop=42)) == ((42, 42), 21, 42)
    assert choose_crops(patches(32, only=(224, 224)), OpenVocabSettings()) == ((224, 224), 112, 224)
    assert Crops((28, 28), 14, 30).fit(60, 90) == (30, 45)
    with pytest.raises(SizeError, match="a stride of 57 px leaves pixels between crops of 56x56 unseen"):
        choose_crops(model, OpenVocabSettings(data=data, stride=57))


def test_names_are_words(tmp_path: Path) -> None:
    voc = Labelling(classes=("background", "tvmonitor", "cat"), zero_is_void=False)
    assert name_classes(voc, None) == ("tv monitor", "cat")
    mine = Labelling(classes=("cat", "door-stuff", "wall-brick", "sky-other"), zero_is_void=False)
    assert name_classes(mine, None) == ("cat", "door stuff", "wall brick", "sky other")
    stuff = name_classes(Labelling(classes=COCO_STUFF, zero_is_void=False), None)
    assert {"door", "wall brick", "sky", "wall"} <= set(stuff)
    with pytest.raises(DataError, match="the classes: 'sky other' names more than one class"):
        name_classes(replace(mine, classes=("sky-other", "sky other")), None)
    for name, classes in KNOWN_CLASSES.items():
        spoken = name_classes(Labelling(classes=tuple(classes), zero_is_void=False), None)
        assert len(set(spoken)) == len(spoken), name
    file = tmp_path / "names.txt"
    file.write_text("television\nkitten\n")
    assert name_classes(voc, str(file)) == ("television", "kitten")
    with pytest.raises(DataError, match=r"has 2 names, and there are 4 classes .* from cat to sky-other"):
        name_classes(mine, str(file))
    file.write_text("cat\ncat\n")
    with pytest.raises(DataError, match="'cat'"):
        name_classes(voc, str(file))


def test_a_background_is_void_or_what_no_class_fits(
    tmp_path: Path, settings: OpenVocabSettings, patches: Callable, make_ade: Callable
) -> None:
    """Red is the background: without it two classes are scored, on their own pixels."""
    root = make_ade(tmp_path / "voc", classes=("background", "green", "blue"), sizes=((56, 56),))
    settings = replace(settings, data=root, crop=56)
    without = run(speaking(patches), settings, tmp_path / "without")
    assert values(without)[0] > 90
    assert without.blocks[0].rows[0] == ("background", None, None, 0.0)
    sure = run(speaking(patches), replace(settings, background=1.0), tmp_path / "sure")
    assert {row[0]: row[2] for row in sure.blocks[0].rows}["background"] > 99
    some = run(speaking(patches), replace(settings, background=0.9, temperature=0.1), tmp_path / "some")
    assert values(some)[0] > values(sure)[0]
    colours = replace(settings, data=make_ade(tmp_path / "ade"), background=0.5)
    with pytest.raises(ConfigError, match=r"--background 0.5: .* has no class called background"):
        run(speaking(patches), colours, tmp_path / "out")


def test_scores_do_not_depend_on_batches_and_are_kept(
    tmp_path: Path, settings: OpenVocabSettings, patches: Callable
) -> None:
    whole = run(speaking(patches), settings, tmp_path / "whole", cache=tmp_path / "one")
    single = run(speaking(patches), replace(settings, save_maps=1), tmp_path / "single", batch_size=1)
    assert values(single) == values(whole)
    assert sum(name.endswith("-overlay.png") for name in single.files) == 1
    again = speaking(patches)
    assert values(run(again, settings, tmp_path / "again")) == values(whole)
    assert again.sizes == []


def _rank(rank: int, world: int, port: int, model: Any, settings: OpenVocabSettings, out: Path) -> None:
    from evals.seg_probe import areas

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    areas.CHUNK = 3
    with joined():
        report = run(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps(values(report)))


def test_two_ranks_score_as_one(
    tmp_path: Path, settings: OpenVocabSettings, patches: Callable, free_port: int
) -> None:
    alone = run(speaking(patches), settings, tmp_path / "alone", cache=tmp_path / "one")
    out = tmp_path / "ranks"
    out.mkdir()
    multiprocessing.spawn(_rank, (2, free_port, speaking(patches), settings, out), nprocs=2, join=True)
    both = read(out / "open-vocab-patches14.json")
    assert both.metrics == alone.metrics and both.settings["resolved"]["ranks"] == 2
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == values(both)


def test_bad_input_is_one_error(tmp_path: Path, settings: OpenVocabSettings, patches: Callable) -> None:
    for changes in ({"background": 1.5}, {"temperature": 0.0}, {"stride": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            replace(settings, **changes)
    with pytest.raises(DataError, match="is not in the layout of Pascal Context"):
        run(speaking(patches), replace(settings, layout="context"), tmp_path / "out")
    model = speaking(patches)
    model.text.project = lambda summaries: summaries / 0
    with pytest.raises(RadioError, match="gives values that are not finite"):
        run(model, settings, tmp_path / "out")


def test_layouts_of_pascal_context_and_coco_stuff(tmp_path: Path, patches: Callable) -> None:
    """Both count classes from 0 and write void as 255; Context's 0 is its background."""

    def write(image: Path, labels: Path, label: int) -> None:
        for path in (image, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(image)
        Image.fromarray(np.array([[label, 255, 0] * 8] * 20, np.uint8)).save(labels)

    context, stuff = tmp_path / "VOCdevkit" / "VOC2010", tmp_path / "coco_stuff164k"
    (context / "ImageSets/SegmentationContext").mkdir(parents=True)
    for name in ("train", "val"):
        key = f"2008_00000{len(name)}"
        (context / f"ImageSets/SegmentationContext/{name}.txt").write_text(f"{key}\n")
        write(context / f"JPEGImages/{key}.jpg", context / f"SegmentationClassContext/{key}.png", 59)
        labels = stuff / f"annotations/{name}2017/{key}_labelTrainIds.png"
        write(stuff / f"images/{name}2017/{key}.jpg", labels, 170)
    for root, home, count, last in (
        (tmp_path / "VOCdevkit" / "..", context, 60, "wood"),
        (context, context, 60, "wood"),
        (tmp_path / "coco_stuff164k", stuff, 171, "wood"),
    ):
        data = open_dataset(root, voc_split=None, known=KNOWN_CLASSES)
        assert len(data.labelling.classes) == count and data.labelling.classes[-1] == last
        assert home.resolve() in data.val.pairs[0].image.resolve().parents
        labels = read_labels(data.val.pairs[0].labels, data.labelling)
        assert labels[0, :3].tolist() == [count - 1, VOID, 0]
        assert data.val.pairs != data.train.pairs and len(data.notes) == 2
    void = replace(data.labelling, classes=("background", "a"), background_is_void=True)
    assert void.table()[:2].tolist() == [VOID, 1]
    shutil.rmtree(stuff / "images/train2017")
    val = open_dataset(stuff, voc_split=None, known=KNOWN_CLASSES, parts=("val",))
    assert val.val == data.val and val.train.pairs == () and len(val.notes) == 1
    (context / "ImageSets/SegmentationContext/train.txt").unlink()
    assert len(open_dataset(context, voc_split=None, known=KNOWN_CLASSES, parts=("val",)).val.pairs) == 1
    with pytest.raises(DataError, match="train2017: no such folder"):
        open_dataset(stuff, voc_split=None, known=KNOWN_CLASSES)
    data.val.pairs[0].labels.unlink()
    with pytest.raises(DataError, match=r"_labelTrainIds.png: no such file"):
        open_dataset(stuff, voc_split=None, known=KNOWN_CLASSES, parts=("val",))
