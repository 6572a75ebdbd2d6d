"""The settings of a run's tasks: in its file, on its command line, and in the scores that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from evals.core.evaluator import Evaluator, evaluators
from evals.core.report import read
from evals.knn import KnnSettings
from evals.resolution import ResolutionSettings
from evals.seg_probe.protocol import SegSettings
from evals.throughput import ThroughputSettings
from evals.vqa.settings import TaskFiles, VqaSettings
from evals.zeroshot import ZeroshotSettings
from radio import entry
from radio.config import from_plain, read_yaml, to_plain, write_yaml
from radio.errors import ConfigError
from train.cli import main
from train.commands import check_tasks
from train.config import TrainConfig
from train.recipes import recipes
from train.setup import check_settings
from train.tables.layout import TableLayout
from train.tables.options import TableCommand
from train.tasks import check_data, scored_jobs, scored_tasks, task_settings

from .conftest import image_bytes, read_records

TINY = (
    *("--teachers.0.model", "tiny:clip", "--teachers.1.model", "tiny:dense"),
    *("--teachers.2.model", "tiny:sam", "--teachers.2.batch-size", "2"),
    *("--resolution", "48", "--steps", "2", "--batch-size", "2", "--device", "cpu"),
    *("--data.scenes", "50", "--data.workers", "0"),
)
KNN = KnnSettings(bank="/data/train", query="/data/val", k=(5, 10))
SEG = SegSettings(data=Path("/data/ade"), seeds=2)


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    """Settings of another package's evaluator: one has no default."""

    bank: Path
    max_order: int = 2
    scale: float = 1.0


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register another package's evaluator that nobody runs, `the-norm`."""
    made = Evaluator(name="the-norm", settings=NormSettings, evaluate=lambda *_: 1 / 0)
    list(evaluators)  # ours come first
    monkeypatch.setitem(evaluators._entries, "the-norm", lambda: made)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The settings that a command line gives; nothing is trained."""
    configs: list[TrainConfig] = []

    def run(name: str, config: TrainConfig, console: Console, *, restart: bool) -> int:
        configs.append(config)
        return 0

    def run_tables(tables: Sequence[TableLayout], default: Any, command: TableCommand, *_: Any) -> int:
        configs.append(command.config)
        return 0

    def plan(runs: dict[str, TrainConfig], *_: Any) -> int:
        configs.extend(runs.values())
        return 0

    monkeypatch.setattr("train.tables.commands.run_tables", run_tables)
    for command in (run, plan):
        monkeypatch.setattr(f"train.commands.{command.__name__}", command)
    return configs


def test_tasks_go_through_a_file(tmp_path: Path) -> None:
    files = TaskFiles(questions=Path("/data/gqa.json"))
    tasks = {"knn": KNN, "seg": SEG, "vqa": VqaSettings(benchmarks={"gqa": files})}
    config = replace(recipes["smoke"](), tasks=tasks, data_root=Path("/data"))
    write_yaml(config, tmp_path / "config.yaml")
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())["tasks"]
    assert list(plain) == list(tasks)
    assert plain["knn"]["query"] == "/data/val" and plain["seg"]["data"] == "/data/ade"
    assert read_yaml(TrainConfig, tmp_path / "config.yaml") == config


def test_a_file_names_what_it_changes(tmp_path: Path) -> None:
    plain = to_plain(recipes["smoke"]())
    plain["tasks"] = {"knn": {"bank": "/data/train", "query": "/data/val", "k": [5, 10]}}
    assert from_plain(TrainConfig, plain).tasks == {"knn": KNN}
    del plain["tasks"], plain["data_root"]  # a file of before there were any
    assert from_plain(TrainConfig, plain) == recipes["smoke"]()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"knn": {"bnak": "x"}}, "unknown setting 'tasks.knn.bnak'; did you mean bank?"),
        ({"knnn": {}}, "tasks: unknown evaluator 'knnn'; did you mean knn?"),
        ({3: {}}, "tasks: 3 is not the name of a task"),
        (["knn"], "tasks: wanted a mapping of tasks to their settings, got a list of 1"),
        (None, "tasks: wanted a mapping of tasks to their settings, got None"),
        ({"knn": "/data"}, "tasks.knn: wanted a mapping, got str"),
        ({"knn": {"k": ["5"]}}, "tasks.knn.k[0]: wanted int, got '5'"),
        ({"knn": {"query": "/data/val"}}, "tasks.knn: a query without a bank has no neighbours"),
        ({"seg": {"lr": -1.0}}, "tasks.seg: lr: -1.0 is out of bounds"),
        ({"the-norm": {}}, "missing setting 'tasks.the-norm.bank'; give it a value"),
        ({"the-norm": {"bank": "a\0b"}}, "tasks.the-norm.bank: wanted a text of"),
    ],
)
@pytest.mark.usefixtures("norm")
def test_bad_settings_of_tasks_are_told_by_their_place(tasks: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_plain(TrainConfig, {**to_plain(recipes["smoke"]()), "tasks": tasks})
    assert str(caught.value).startswith(message)


def test_tasks_are_options_of_the_run_that_scores_them(parsed: list[TrainConfig]) -> None:
    knn = ("--knn.bank", "/data/train", "--knn.query=/data/val", "--knn.k", "5", "10")
    for words in (
        ["demo", *knn],
        ["smoke", "--score", "vqa", "knn", *knn],
        ["smoke", "--score=knn", *knn],
        ["smoke", "--score", "seg", "--score", "knn", *knn],  # the last counts
        ["smoke", *knn, "--eval_every", "+5"],
        ["smoke", *knn, "--eval-every=5", "--eval-tasks", "seg", "knn"],
        ["demo", *knn, "--plan"],
    ):
        assert main(words) == 0
        assert parsed.pop().tasks == {"knn": KNN}
    assert main(["table2", "--size", "paper", *knn]) == 0
    assert [config.tasks["knn"] for config in parsed] == [KNN]


def test_options_go_over_the_settings_of_a_file(parsed: list[TrainConfig], tmp_path: Path) -> None:
    config = replace(recipes["smoke"](), score=("knn", "zeroshot"), tasks={"knn": KNN, "seg": SEG})
    write_yaml(config, path := tmp_path / "config.yaml")
    assert main([str(path), "--knn.query", "/data/test", "--zeroshot.scenes", "20"]) == 0
    assert parsed.pop().tasks == {
        "knn": replace(KNN, query="/data/test"),
        "seg": SEG,  # not scored now, and kept for later
        "zeroshot": ZeroshotSettings(scenes=20),
    }
    assert main([str(path)]) == 0
    assert parsed.pop() == config


def test_settings_inside_a_tasks_settings(parsed: list[TrainConfig], tmp_path: Path) -> None:
    """In a file only: --resolution is an option of the run itself."""
    wanted = ResolutionSettings(sides=(48, 96), tasks=("knn",), knn=KnnSettings(k=(3,)))
    config = replace(recipes["smoke"](), score=("resolution",), tasks={"resolution": wanted})
    write_yaml(config, path := tmp_path / "config.yaml")
    assert main([str(path), "--resolution", "48"]) == 0
    assert parsed.pop() == replace(config, resolution=48)
    path.write_text(path.read_text().replace("- knn", "- vqa"))
    with pytest.raises(ConfigError, match="vqa"):
        read_yaml(TrainConfig, path)


@pytest.mark.usefixtures("norm")
def test_a_required_setting_is_an_option_too(
    parsed: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["smoke", "--score", "the-norm"]
    assert main([*words, "--the_norm.max_order", "3", "--the-norm.bank", "x"]) == 0
    assert parsed.pop().tasks == {"the-norm": NormSettings(bank=Path("x"), max_order=3)}
    for more, shown in ((["--the-norm.scale", "2"], "err"), (["--help"], "out")):
        with pytest.raises(SystemExit):
            main([*words, *more])
        said = getattr(capsys.readouterr(), shown)
        assert "--the-norm.bank" in said and "required" in said
    assert main(words) == 0
    assert parsed.pop().tasks == {}  # and the run refuses to start:
    config = replace(recipes["smoke"](), score=("knn", "the-norm"))
    message = "^the-norm has no default for all of its settings: give --the-norm.bank, or leave it out"
    with pytest.raises(ConfigError, match=message):
        check_tasks(config)
    check_tasks(replace(config, tasks={"the-norm": NormSettings(bank=Path("x"))}))
    check_tasks(replace(config, score=(), eval_tasks=("the-norm",)))  # which no step runs


@pytest.mark.usefixtures("norm")
def test_other_packages_settings_are_checked_by_the_runs_rules() -> None:
    config = replace(recipes["smoke"](), tasks={"the-norm": NormSettings(bank=Path(), scale=float("nan"))})
    with pytest.raises(ConfigError, match=r"^--the-norm\.scale: nan is no number to work with"):
        check_settings(config, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seg.data", "x"], "--seg.data: this run does not score seg; add it to --score, or to --eval-t"),
        (["--score", "knn", "--seg.data=x"], "--seg.data: this run does not score seg"),
        (["--score", "seg", "--score", "--seg.data", "x"], "--seg.data: this run does not score seg"),
        (["--knn.no-leave-one-out"], "--knn.no-leave-one-out: this run does not score knn"),
        (["--eval-every", "0", "--knn.k", "5"], "--knn.k: this run does not score knn"),
        (["--score", "knn", "--knn.query", "x"], "a query without a bank has no neighbours"),
        (["--score", "knn", "--knn.temperature", "0"], "temperature: 0.0 is out of bounds"),
        (["--score", "knnn", "--knn.k", "5"], "unknown evaluator 'knnn'; did you mean knn?"),
    ],
)
def test_options_that_a_run_does_not_use_are_refused(
    words: Sequence[str], message: str, parsed: list[TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.train(["smoke", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1
    assert parsed == []


def test_help_has_the_options_of_scored_tasks_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in ((["demo"], True), (["demo", "--score"], True), (["smoke"], False)):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        said = capsys.readouterr().out
        assert ("--knn.bank" in said) is shown
        assert ("--seg.data" in said) is (words == ["demo"])  # --eval-tasks has k-NN and zero-shot alone
        assert "--maps." not in said and "--tasks" not in said


def test_a_task_called_like_a_section_has_no_options(
    monkeypatch: pytest.MonkeyPatch, parsed: list[TrainConfig]
) -> None:
    """They could not be told from those of the run."""
    made = Evaluator(name="data", settings=SegSettings, evaluate=lambda *_: 1 / 0)
    monkeypatch.setitem(evaluators._entries, "data", lambda: made)
    assert main(["smoke", "--score", "data", "--data.scenes", "50"]) == 0
    assert (parsed[0].data.scenes, parsed[0].tasks) == (50, {})
    assert task_settings(parsed[0], scored_tasks(parsed[0])) == {"data": SegSettings()}
    with pytest.raises(SystemExit):
        main(["smoke", "--score", "data", "--data.seeds", "2"])


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Folders of two classes of four images: `bank`, and `swapped` where each has the other's label."""
    for number in range(8):
        first = number < 4
        for folder, label in (("bank", "ab"[first]), ("swapped", "ba"[first])):
            path = tmp_path / folder / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number))
    return tmp_path


def test_a_run_scores_by_its_settings_on_the_way_and_at_the_end(
    labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nearest neighbour of a bank's image is that image: all are right, and with swapped labels none."""
    out = labelled / "run"
    words = ["smoke", *TINY, "--out", str(out), "--score", "knn", "--eval-every", "2", "--eval-tasks", "knn"]
    own = ["--knn.bank", str(labelled / "bank"), "--knn.k", "1", "--knn.query"]
    assert main([*words, *own, str(labelled / "bank")]) == 0
    assert [record["knn/top1"] for record in read_records(out) if "knn/top1" in record] == [100.0]
    for report in (out / "reports" / "step-000002", out / "reports"):
        assert read(report / "knn-student.json").metrics["top1"].value == 100.0
    assert read_yaml(TrainConfig, out / "config.yaml").tasks["knn"].bank == str(labelled / "bank")
    logged = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()

    assert main([*words, *own, str(labelled / "swapped")]) == 0
    assert "student: knn: running" in capsys.readouterr().out
    assert read(out / "reports" / "knn-student.json").metrics["top1"].value == 0.0
    assert (out / "metrics.jsonl").read_bytes() == logged  # not trained again
    assert main([*words, *own, str(labelled / "swapped")]) == 0
    assert "student: knn: unchanged, kept" in capsys.readouterr().out


@pytest.fixture
def sets(labelled: Path) -> Path:
    """A data.yaml with an ImageNet whose validation images are its training images, ADE20K and VOC2012."""
    (labelled / "imagenet").mkdir()
    for name in ("train", "val"):
        (labelled / "imagenet" / name).symlink_to(labelled / "bank")
    for name in ("ade", "voc"):
        (labelled / name).mkdir()
    path = labelled / "data.yaml"
    path.write_text("imagenet: imagenet\nade20k: ade\nvoc: voc\n")
    return path


def test_tasks_are_scored_on_the_data_sets_of_a_data_root(sets: Path) -> None:
    score = ("knn", "seg", "throughput")
    config = replace(recipes["smoke"](), score=score, tasks={"seg": SegSettings(seeds=2)}, data_root=sets)
    images = sets.parent / "imagenet"
    assert scored_jobs(config, score) == {
        "knn on imagenet": KnnSettings(bank=str(images / "train"), query=str(images / "val")),
        "seg on ade20k": SegSettings(seeds=2, data=sets.parent / "ade"),
        "seg on voc": SegSettings(seeds=2, data=sets.parent / "voc", voc_split="train"),
        "throughput": ThroughputSettings(),  # needs no data
    }
    check_data(config)
    assert scored_jobs(replace(config, tasks={"knn": KNN}), ["knn"]) == {"knn": KNN}  # its own data win
    with pytest.raises(ConfigError, match=r"^sam: .*data\.yaml has not coco or lvis, which it is scored on"):
        check_tasks(replace(config, score=("knn", "sam")))


def test_data_that_are_not_there_end_a_run_before_it_starts(
    sets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets.parent)
    (sets.parent / "voc").rmdir()
    out = sets.parent / "run"
    words = ["smoke", *TINY, "--out", str(out), "--score"]
    both, absent = ["--data-root", str(sets)], "no such file or folder; mend the task's settings"
    for more, message in (
        (["knn", "seg", *both], f"seg on voc: {sets.parent / 'voc'}: {absent} or {sets}, or leave it out"),
        (["seg", "--seg.data", "gone"], f"seg: gone: {absent}, or leave it out"),
        (["knn", "--knn.bank", "/gone", "--knn.query", "/gone/too"], f"knn: /gone: {absent}"),
        (["knn", "--data-root", "gone.yaml"], "gone.yaml: no such file or folder; give a data.yaml"),
    ):
        assert entry.train([*words, *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not out.exists()
    config = replace(recipes["smoke"](), score=("knn",))
    for bank in ("/gone/{000..009}.tar", "gone", "scenes:val"):  # shards, or left to the evaluator
        check_data(replace(config, tasks={"knn": KnnSettings(bank=bank, query=bank)}))
    check_data(
        replace(config, score=("vqa",), tasks={"vqa": VqaSettings(save=Path("/gone"))})
    )  # written there


def test_a_run_scores_on_the_data_sets_of_a_data_root(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sets.parent / "run"
    words = ["smoke", *TINY, "--out", str(out), "--score", "knn", "--eval-every", "2", "--eval-tasks", "knn"]
    assert main([*words, "--data-root", str(sets), "--knn.k", "1"]) == 0
    assert [record["knn-imagenet/top1"] for record in read_records(out)[-1:]] == [100.0]
    assert read(out / "reports" / "knn-student.json").metrics["top1"].value == 100.0
    said = capsys.readouterr().out
    assert "step 2: knn-imagenet/top1 100.0" in said and "| knn on imagenet |" in said
    written = read_yaml(TrainConfig, out / "config.yaml")
    assert (written.data_root, written.tasks) == (sets, {"knn": KnnSettings(k=(1,))})
    logged = (out / "metrics.jsonl").read_bytes()
    assert main([*words, "--data-root", str(sets.parent / "data.yaml"), "--knn.k", "1"]) == 0
    assert "student: knn on imagenet: unchanged, kept" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == logged
