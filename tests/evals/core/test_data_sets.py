from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from evals.core.evaluator import run_evaluator
from evals.core.task import (
    OWN,
    Evaluator,
    RunSettings,
    make_evaluator,
    missing_data,
    name_job,
    settings_on,
    task_of,
)
from evals.correspondence import CorrespondenceSettings
from evals.dense_knn import DenseKnnSettings
from evals.depth import DepthSettings
from evals.fidelity import FidelitySettings
from evals.knn import KnnSettings
from evals.linear import LinearSettings
from evals.maps import MapsSettings
from evals.open_vocab import OpenVocabSettings
from evals.resolution import ResolutionSettings
from evals.retrieval import RetrievalSettings
from evals.sam_dropin import SamSettings
from evals.seg_probe.protocol import SegSettings
from evals.throughput import ThroughputSettings
from evals.vqa.settings import TaskFiles, VqaSettings
from evals.zeroshot import ZeroshotSettings
from radio.datasets import (
    DataSets,
    GqaFiles,
    LlavaFiles,
    LvisFiles,
    PopeFiles,
    ScienceQaFiles,
    TextVqaFiles,
    Vqav2Files,
)
from radio.errors import ConfigError

ROOT = Path("/d")
SETS = DataSets(
    imagenet=ROOT / "in",
    imagenet_v2=ROOT / "v2",
    imagenet_sketch=ROOT / "s",
    ade20k=ROOT / "ade",
    voc=ROOT / "voc",
    context=ROOT / "context",
    coco_stuff=ROOT / "stuff",
    nyu=ROOT / "nyu",
    coco=ROOT / "coco",
    lvis=LvisFiles(annotations=ROOT / "lvis_v1_val.json", images=ROOT / "coco"),
    roxford5k=ROOT / "ox",
    rparis6k=ROOT / "par",
    spair=ROOT / "spair",
    llava=LlavaFiles(
        pretrain_data=ROOT / "p.json",
        pretrain_images=ROOT / "p",
        instruct_data=ROOT / "i.json",
        instruct_images=ROOT / "i",
    ),
    gqa=GqaFiles(questions=ROOT / "g.json", images=ROOT / "g"),
    textvqa=TextVqaFiles(questions=ROOT / "t.json", images=ROOT / "t", ocr=ROOT / "ocr.json"),
    sqa=ScienceQaFiles(questions=ROOT / "s.json", splits=ROOT / "splits.json", images=ROOT / "s"),
    pope=PopeFiles(questions=ROOT / "pope", images=ROOT / "v"),
    vqav2=Vqav2Files(questions=ROOT / "v.json", answers=ROOT / "a.json", images=ROOT / "v"),
    language_model=ROOT / "vicuna",
)

PLACED_VQA = VqaSettings(
    pretrain_data=ROOT / "p.json",
    pretrain_images=ROOT / "p",
    instruct_data=ROOT / "i.json",
    instruct_images=ROOT / "i",
    language_model="/d/vicuna",
    benchmarks={
        "gqa": TaskFiles(questions=ROOT / "g.json", images=ROOT / "g"),
        "vqav2": TaskFiles(questions=ROOT / "v.json", annotations=ROOT / "a.json", images=ROOT / "v"),
        "textvqa": TaskFiles(questions=ROOT / "t.json", images=ROOT / "t"),
        "scienceqa": TaskFiles(questions=ROOT / "s.json", splits=ROOT / "splits.json", images=ROOT / "s"),
        "pope": TaskFiles(questions=ROOT / "pope", images=ROOT / "v"),
    },
)

OWN_VQA = VqaSettings(pretrain_data=Path("a.json"), instruct_data=Path("b.json"))


@pytest.mark.parametrize(
    ("task", "settings", "placed"),
    [
        (
            "knn",
            KnnSettings(k=(3,)),
            {"imagenet": KnnSettings(k=(3,), bank="/d/in/train", query="/d/in/val")},
        ),
        (
            "knn",
            KnnSettings(leave_one_out=True),
            {"imagenet": KnnSettings(leave_one_out=True, bank="/d/in/train")},
        ),
        (
            "linear",
            LinearSettings(c=(1.0,)),
            {
                "imagenet": LinearSettings(
                    c=(1.0,), train=("/d/in/train",), val=("/d/in/val",), also=("v2=/d/v2", "sketch=/d/s")
                )
            },
        ),
        (
            "linear",
            LinearSettings(also=("mine=/m",)),
            {"imagenet": LinearSettings(train=("/d/in/train",), val=("/d/in/val",), also=("mine=/m",))},
        ),
        (
            "zeroshot",
            ZeroshotSettings(templates="simple"),
            {"imagenet": ZeroshotSettings(query="/d/in/val", class_names="imagenet", templates="simple")},
        ),
        ("maps", MapsSettings(), {"imagenet": MapsSettings(query="/d/in/val")}),
        (
            "fidelity",
            FidelitySettings(num_images=9),
            {"imagenet": FidelitySettings(num_images=9, images="/d/in/val")},
        ),
        ("depth", DepthSettings(layers=4), {"nyu": DepthSettings(layers=4, data=ROOT / "nyu")}),
        (
            "resolution",
            ResolutionSettings(sides=(32, 64)),
            {
                "imagenet": ResolutionSettings(
                    sides=(32, 64),
                    knn=KnnSettings(bank="/d/in/train", query="/d/in/val"),
                    zeroshot=ZeroshotSettings(query="/d/in/val", class_names="imagenet", templates="openai"),
                )
            },
        ),
        (
            "resolution",
            ResolutionSettings(tasks=("knn",)),
            {
                "imagenet": ResolutionSettings(
                    tasks=("knn",), knn=KnnSettings(bank="/d/in/train", query="/d/in/val")
                )
            },
        ),
        (
            "seg",
            SegSettings(seeds=2),
            {
                "ade20k": SegSettings(seeds=2, data=ROOT / "ade"),
                "voc": SegSettings(seeds=2, data=ROOT / "voc", voc_split="train"),
            },
        ),
        (
            "seg",
            SegSettings(voc_split="trainaug"),
            {"voc": SegSettings(data=ROOT / "voc", voc_split="trainaug")},
        ),
        (
            "dense-knn",
            DenseKnnSettings(k=7),
            {
                "ade20k": DenseKnnSettings(k=7, data=ROOT / "ade"),
                "voc": DenseKnnSettings(k=7, data=ROOT / "voc", voc_split="train"),
            },
        ),
        (
            "dense-knn",
            DenseKnnSettings(voc_split="trainaug"),
            {"voc": DenseKnnSettings(data=ROOT / "voc", voc_split="trainaug")},
        ),
        (
            "open-vocab",
            OpenVocabSettings(stride=7),
            {
                "ade20k": OpenVocabSettings(stride=7, data=ROOT / "ade"),
                "voc": OpenVocabSettings(stride=7, data=ROOT / "voc", layout="voc"),
                "context": OpenVocabSettings(stride=7, data=ROOT / "context", layout="context"),
                "coco_stuff": OpenVocabSettings(stride=7, data=ROOT / "stuff", layout="coco-stuff"),
            },
        ),
        (
            "open-vocab",
            OpenVocabSettings(background=0.4),
            {
                "voc": OpenVocabSettings(background=0.4, data=ROOT / "voc", layout="voc"),
                "context": OpenVocabSettings(background=0.4, data=ROOT / "context", layout="context"),
            },
        ),
        (
            "open-vocab",
            OpenVocabSettings(layout="coco-stuff"),
            {"coco_stuff": OpenVocabSettings(data=ROOT / "stuff", layout="coco-stuff")},
        ),
        (
            "sam",
            SamSettings(prompts="points"),
            {
                "coco": SamSettings(
                    prompts="points",
                    data=ROOT / "coco/annotations/instances_val2017.json",
                    images=ROOT / "coco/val2017",
                ),
                "lvis": SamSettings(prompts="points", data=ROOT / "lvis_v1_val.json", images=ROOT / "coco"),
            },
        ),
        (
            "retrieval",
            RetrievalSettings(size=64),
            {
                "roxford5k": RetrievalSettings(size=64, data=ROOT / "ox"),
                "rparis6k": RetrievalSettings(size=64, data=ROOT / "par"),
            },
        ),
        (
            "correspondence",
            CorrespondenceSettings(upsample=2),
            {"spair": CorrespondenceSettings(upsample=2, data=ROOT / "spair")},
        ),
        ("vqa", VqaSettings(), {"llava": PLACED_VQA}),
        (
            "vqa",
            VqaSettings(stages=("pretrain", "instruct"), language_model="tiny"),
            {
                "llava": replace(
                    PLACED_VQA, stages=("pretrain", "instruct"), language_model="tiny", benchmarks={}
                )
            },
        ),
        (
            "vqa",
            VqaSettings(task="textvqa", ocr=True),
            {
                "llava": replace(
                    PLACED_VQA,
                    task="textvqa",
                    ocr=True,
                    benchmarks={
                        "textvqa": TaskFiles(
                            questions=ROOT / "t.json",
                            images=ROOT / "t",
                            ocr=True,
                            ocr_file=ROOT / "ocr.json",
                        )
                    },
                )
            },
        ),
        (
            "vqa",
            VqaSettings(task="gqa", questions=Path("q.json"), images=Path("i")),
            {
                "llava": replace(
                    PLACED_VQA, task="gqa", questions=Path("q.json"), images=Path("i"), benchmarks={}
                )
            },
        ),
        (
            "vqa",
            OWN_VQA,
            {OWN: replace(OWN_VQA, language_model="/d/vicuna", benchmarks=PLACED_VQA.benchmarks)},
        ),
    ],
)
def test_settings_on_a_users_data_sets(task: str, settings: Any, placed: dict[str, Any]) -> None:
    evaluator = make_evaluator(task)
    assert settings_on(evaluator, settings, SETS) == placed
    assert list(settings_on(evaluator, settings, SETS)) == list(placed)
    assert settings_on(evaluator, settings, DataSets()) == {}


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("knn", KnnSettings(bank="a", query="b")),
        ("linear", LinearSettings(train=("a",), val=("b",))),
        ("zeroshot", ZeroshotSettings(query="a")),
        ("zeroshot", ZeroshotSettings(captions="scenes")),
        ("maps", MapsSettings(query="scenes:val")),
        ("depth", DepthSettings(data=Path("a"))),
        ("fidelity", FidelitySettings(images="a")),
        ("resolution", ResolutionSettings(tasks=("knn",), knn=KnnSettings(bank="a", query="b"))),
        ("seg", SegSettings(data=Path("a"))),
        ("retrieval", RetrievalSettings(data=Path("a"))),
        ("correspondence", CorrespondenceSettings(data=Path("a"))),
        ("dense-knn", DenseKnnSettings(data=Path("a"))),
        ("open-vocab", OpenVocabSettings(data=Path("a"))),
        ("sam", SamSettings(data=Path("a.json"), images=Path("a"))),
        ("vqa", replace(OWN_VQA, task="gqa", questions=Path("a.json"), language_model="tiny")),
        ("vqa", replace(OWN_VQA, stages=("pretrain", "instruct"), language_model="tiny")),
        ("vqa", VqaSettings(task="gqa", questions=Path("a.json"), predictions=Path("p.jsonl"))),
        ("throughput", ThroughputSettings()),
    ],
)
def test_data_that_the_settings_name_win(task: str, settings: Any) -> None:
    for sets in (SETS, DataSets()):
        assert settings_on(make_evaluator(task), settings, sets) == {OWN: settings}


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("open-vocab", OpenVocabSettings()),
        ("open-vocab", OpenVocabSettings(background=0.4)),
        ("sam", SamSettings()),
        ("sam", SamSettings(prompts="points")),
    ],
)
def test_each_data_set_and_background_has_a_report_of_its_own(task: str, settings: Any) -> None:
    evaluator = make_evaluator(task)
    placed = settings_on(evaluator, settings, SETS)
    names = [evaluator.suffix(each) for each in placed.values()]
    assert len(set(names)) == len(names) > 1
    if task == "open-vocab":
        assert all(name.endswith("-background") == (settings.background is not None) for name in names)


def test_a_root_gives_only_the_language_model_that_is_not_named() -> None:
    evaluator = make_evaluator("vqa")
    named = replace(OWN_VQA, task="gqa", questions=Path("a.json"))
    assert settings_on(evaluator, named, SETS) == {OWN: replace(named, language_model="/d/vicuna")}
    assert settings_on(evaluator, named, DataSets()) == {OWN: named}
    (placed,) = settings_on(evaluator, VqaSettings(), SETS).values()
    assert settings_on(evaluator, placed, SETS) == {OWN: placed}


def test_the_second_segmentation_set_has_a_name_of_its_own() -> None:
    evaluator = make_evaluator("seg")
    placed = settings_on(evaluator, SegSettings(), SETS)
    assert [evaluator.suffix(settings) for settings in placed.values()] == ["", "-voc"]


def test_resolution_has_a_report_for_each_set_of_its_tasks() -> None:
    evaluator = make_evaluator("resolution")
    settings = ResolutionSettings(tasks=("knn", "retrieval", "dense-knn"))
    placed = settings_on(evaluator, settings, SETS)
    assert list(placed) == ["roxford5k", "rparis6k"]
    assert [each.retrieval.data for each in placed.values()] == [SETS.roxford5k, SETS.rparis6k]
    assert [each.dense_knn.data for each in placed.values()] == [SETS.ade20k, SETS.voc]
    assert [each.knn for each in placed.values()] == [
        settings_on(make_evaluator("knn"), KnnSettings(), SETS)["imagenet"]
    ] * 2
    assert [evaluator.suffix(each) for each in placed.values()] == ["-ox", "-par-voc"]


def test_a_report_takes_the_one_set_of_the_root(
    tmp_path: Path, make_folder: Callable[..., Path], backbone: Callable[..., Any]
) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "in" / split)
    (tmp_path / "data.yaml").write_text("imagenet: in\nade20k: ade\nvoc: voc\n")
    run = RunSettings(data_root=tmp_path, cache=tmp_path / "cache", device="cpu")
    settings = KnnSettings(k=(1,))
    report = run_evaluator(make_evaluator("knn"), backbone(), settings, tmp_path / "o", run=run)
    assert report.settings["query"] == str(tmp_path / "in" / "val")
    assert report.metrics["top1"].value == 100  # the same images
    with pytest.raises(ConfigError) as caught:
        run_evaluator(make_evaluator("seg"), backbone(), out=tmp_path / "o", run=run)
    assert str(caught.value) == (
        f"seg: {tmp_path} has ade20k and voc, and a report is of one data set; give the settings that "
        f"settings_on returns for each"
    )
    with pytest.raises(
        ConfigError, match=r"^sam: .* has not coco or lvis, which it is scored on; name it there$"
    ):
        run_evaluator(make_evaluator("sam"), backbone(), out=tmp_path / "o", run=run)


def test_what_a_task_lacks_is_named(tmp_path: Path) -> None:
    def lack(task: str, settings: Any, *there: str) -> str:
        (tmp_path / "data.yaml").write_text("".join(f"{name}: {name}\n" for name in there) or "{}")
        text = missing_data(make_evaluator(task), settings, tmp_path)
        return text.removeprefix(f"{tmp_path} has not ").removesuffix(
            ", which it is scored on; name it there"
        )

    assert lack("knn", KnnSettings()) == "imagenet"
    assert lack("seg", SegSettings()) == "ade20k or voc"
    assert lack("seg", SegSettings(voc_split="train"), "ade20k") == "voc"
    assert lack("open-vocab", OpenVocabSettings(background=0.5), "coco-stuff") == "voc or context"
    benchmarks = "gqa or textvqa or sqa or vqav2 or pope"
    assert lack("vqa", VqaSettings()) == f"llava, nor {benchmarks}"
    assert lack("vqa", VqaSettings(), "llava") == lack("vqa", OWN_VQA) == benchmarks
    assert lack("vqa", VqaSettings(task="pope"), "llava", "gqa") == "pope"
    assert lack("vqa", VqaSettings(task="gqa", questions=Path("q.json")), "gqa") == "llava"
    several = ResolutionSettings(tasks=("knn", "retrieval", "dense-knn"))
    assert lack("resolution", several) == "imagenet, nor ade20k or voc, nor roxford5k or rparis6k"
    assert lack("resolution", several, "imagenet", "voc") == "roxford5k or rparis6k"
    assert lack("resolution", several, "rparis6k", "voc") == "imagenet"


@dataclass(frozen=True, kw_only=True)
class _Settings:
    data: str = ""


def _evaluator(placed: Any) -> Evaluator[_Settings]:
    return Evaluator(
        name="mine", settings=_Settings, evaluate=lambda *_: 1 / 0, data_sets=lambda settings, sets: placed
    )


def test_an_evaluator_without_protocols_says_so(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("{}")
    plain = Evaluator(name="mine", settings=_Settings, evaluate=lambda *_: 1 / 0)
    assert settings_on(plain, _Settings(), SETS) == {}
    assert missing_data(plain, _Settings(), tmp_path) == (
        "it has no protocol for the data sets of --data-root; name its data by its own options"
    )


@pytest.mark.parametrize("placed", [None, {"imagnet": _Settings()}, {"imagenet": KnnSettings()}, {3: 3}])
def test_an_evaluator_that_gives_something_else_is_one_error(placed: Any) -> None:
    with pytest.raises(ConfigError, match="mine: its data_sets gave no mapping from names of data sets"):
        settings_on(_evaluator(placed), _Settings(), SETS)
    assert settings_on(_evaluator({"imagenet_21k": _Settings()}), _Settings(), SETS)


@pytest.mark.parametrize(
    ("task", "data_set", "job"),
    [("seg", OWN, "seg"), ("seg", "voc", "seg on voc"), ("x on y", "imagenet_21k", "x on y on imagenet-21k")],
)
def test_a_job_has_its_tasks_name(task: str, data_set: str, job: str) -> None:
    assert name_job(task, data_set) == job
    assert task_of(job) == task
