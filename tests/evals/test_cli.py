from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evals import commands
from evals.cli import main
from evals.core.evaluator import RunSettings, evaluators
from evals.core.report import read
from evals.core.suite import read_noise
from radio.entry import evaluate
from radio.errors import RadioError
from radio.model import ModelConfig, build
from radio.progress import watch_on
from radio.students import students
from radio.teachers import families

SMALL = ["--scenes", "60", "60", "--k", "5", "--plain"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder without runs and reports, wide enough for tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A saved model."""
    path = tmp_path / "runs" / "first" / "ckpt.pt"
    build(ModelConfig(student="vit-tiny12"), seed=1).save(path)
    return path


def test_several_models_give_one_table_and_a_report_each(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knn", str(checkpoint), "arch:vit-tiny12", "arch:vit-tiny12", "--out", "o", *SMALL]) == 0
    names = ("first", "vit-tiny12-untrained", "vit-tiny12-untrained-2")
    assert sorted(path.name for path in (tmp_path / "o").glob("*.json")) == sorted(
        f"knn-{n}.json" for n in names
    )
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "first" in line)
    assert all(name in header for name in names)
    report = read(tmp_path / "o" / "knn-first.json")
    row = next(line for line in out.splitlines() if "top1" in line)
    assert f"{report.metrics['top1'].value:.1f}" in row
    assert report.settings["k"] == [5]


def test_every_window_is_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    windows = ["--window", "2", "4", "global"]
    assert main(["knn", "arch:vitdet-tiny12", *windows, "--out", "o", *SMALL]) == 0
    names = [f"vitdet-tiny12-untrained-window{end}" for end in ("2", "4", "-global")]
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    fingerprints = {read(Path("o") / f"knn-{name}.json").fingerprint for name in names}
    assert len(fingerprints) == 3


def test_reports_lie_beside_the_checkpoint_or_here(checkpoint: Path, tmp_path: Path) -> None:
    main(["knn", str(checkpoint), *SMALL])
    assert (checkpoint.parent / "reports" / "knn-first.json").is_file()
    main(["knn", "vit-tiny12", "--random-init", *SMALL])
    assert (tmp_path / "reports" / "knn-vit-tiny12-untrained.json").is_file()


def test_random_init_takes_a_checkpoints_shape_only(checkpoint: Path) -> None:
    main(["knn", str(checkpoint), "--random-init", *SMALL])
    main(["knn", str(checkpoint), *SMALL])
    folder = checkpoint.parent / "reports"
    trained, untrained = read(folder / "knn-first.json"), read(folder / "knn-first-untrained.json")
    assert trained.fingerprint != untrained.fingerprint


def test_an_architecture_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    for age, (name, arch) in enumerate(
        (("new", "vit-tiny16"), ("mine", "vit-tiny12"), ("old", "vit-tiny12"))
    ):
        path = tmp_path / "runs" / name / "ckpt.pt"
        build(ModelConfig(student=arch), seed=0).save(path)
        os.utime(path, (1000 - age, 1000 - age))
    main(["knn", "--arch", "vit-tiny12", *SMALL])
    assert (tmp_path / "runs" / "mine" / "reports" / "knn-mine.json").is_file()


def test_skipped_images_and_notes_are_said(
    tmp_path: Path, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "d")
    (root / "c1" / "000.png").write_bytes(b"text")
    main(["knn", "vit-tiny12", "--random-init", "--bank", str(root), "--leave-one-out", "--plain"])
    out = " ".join(capsys.readouterr().out.split())
    assert "1 images of d could not be read and were left out; the first: c1/000.png" in out
    assert "k = 200 is more than the 16 images of the bank" in out


def test_the_lists_name_evaluators_and_architectures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        students, "_entries", {name: students[name] for name in ("vit-h14", "vitdet-tiny12", "e-radio-b")}
    )
    monkeypatch.setattr(students, "_declared", {})
    assert main(["list"]) == 0
    assert "knn" in capsys.readouterr().out
    assert main(["list", "--models"]) == 0
    out = capsys.readouterr().out
    assert "radio:…            Load a released RADIO model" in out
    assert all(f"{family}:…" in out for family in families)
    assert main(["list", "--archs"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert 630 < float(rows["vit-h14"][1]) < 640
    assert 165 < float(rows["vit-h14"][2]) < 170  # GMACs at 224 px, as timm's vit_huge_patch14 has
    assert rows["vit-h14"][3] == "224x224"
    assert " ".join(rows["vitdet-tiny12:"]) == "vitdet-tiny12: windows of 4, global blocks 3"
    assert rows["e-radio-b"][3:] == ["224x224", "1024", "1024"]


def test_help_and_no_arguments_print_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        assert "usage: radio-eval TASK MODEL..." in capsys.readouterr().out


def test_listing_needs_no_optional_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["list"]) == 0
    assert evaluate(["knn", "vit-tiny12", "--random-init", *SMALL]) == 2
    assert 'pip install "am-radio[knn]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["knnn", "x"], "no command 'knnn'; did you mean knn?"),
        (["knn"], "no model was named"),
        (["knn", "nosuch.pt"], "nosuch.pt: no such checkpoint file"),
        (["knn", "vit-tiny21", "--random-init"], "or vit-tiny12 or"),
        (["knn", "vit-tiny12", "--arch", "vit-tiny12"], "stands instead of a model"),
        (["knn", "--arch", "vit-tiny21"], "or vit-tiny12 or"),
        (["knn", "--arch", "vit-tiny12"], "none of the 0 checkpoints under"),
        (
            ["knn", "vit-tiny12", "--random-init", "--bank", "nosuch", "--query", "x"],
            "nosuch: no such folder",
        ),
        (["knn", "vit-tiny12", "--random-init", "--bank", "nosuch"], "give --query, or --leave-one-out"),
        (["knn", "vit-tiny12", "--random-init", "--device", "tpu"], "unknown device 'tpu'"),
        (
            ["knn", "vit-tiny12", "--random-init", "--head", "clip", *SMALL],
            "so no head 'clip'",
        ),
        (["knn", "vit-tiny12", "--random-init", "--bnak", "x"], "--bank"),
        (["knn", "vit-tiny12", "--random-init", "--k", "many"], "many"),
        (["knn", "vit-tiny12", "--random-init", "--temperature", "nan"], "temperature: nan"),
        (["knn", "vit-tiny12", "--random-init", "--seed", "-1"], "seed: -1 is out of bounds"),
        (["knn", "vit-tiny12", "--random-init", "--init-seed", "-1"], "init_seed: -1 is out of bounds"),
        (["zeroshot", "scenes:clip", "--ratio", "1e9"], "ratio: 1000000000.0 is out of bounds"),
        (["zeroshot", "scenes:clip", "--workers", "-1"], "workers: -1 is out of bounds"),
        (["all", "scenes:clip", "--knn.k", "99999999"], "k[0]: 99999999 is out of bounds"),
        (["noise", "scenes:clip", "--repeats", "-3"], "repeats: -3 is out of bounds"),
        (["throughput", "vit-tiny12", "--threads", "0"], "threads: 0 is out of bounds"),
        (["throughput", "vit-tiny12", "--preset", "timm", "--repeats", "2"], "says how long to measure"),
        (["vqa", "vit-tiny12", "--stages", "scoer"], "name one or more of pretrain, instruct, score"),
        (["vqa", "vit-tiny12", "--task", "custom"], "give --questions FILE.jsonl too"),
        (["sam", "vit-tiny12", "--clicks", "2"], "goes with --prompts points"),
        (["all", "scenes:clip", "--vqa.lora-rank", "0"], "lora_rank: 0 is out of bounds"),
        (["knn", "vitdet-tiny12", "--window", "8", "0"], "window[1]: 0 is out of bounds"),
        (["knn", "vitdet-tiny12", "--window", "globl"], "globl"),
        (["knn", "arch:e-radio-tiny", "--window", "global"], "has no global attention to choose"),
        (["list", "--arch"], "--archs"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_two(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = evaluate(arguments)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    except SystemExit as stop:  # from tyro, for what it does not know
        assert {"--bnak", "many", "--arch", "globl"} & {*arguments}
        code, error = stop.code, " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("content", [b"just text", b"", b"\x80\x04K\x01."])
def test_a_foreign_checkpoint_is_one_line(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert evaluate(["knn", "ckpt.pt", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("error: ckpt.pt: ")


def test_an_empty_folder_and_one_class_are_one_line(
    tmp_path: Path, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "one", classes=1)
    for folder, said in (("empty", "neither class folders nor tar shards"), ("one", "one class only")):
        code = evaluate(["knn", "vit-tiny12", "--random-init", "--bank", folder, "--query", folder])
        assert code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["knn", "all", "noise"])
@pytest.mark.parametrize("out", ["a-file", "a-file/below", "loop", "nowhere", "x" * 300, "/proc/reports"])
def test_an_out_that_cannot_be_written_is_told_before_the_model_is_loaded(
    tmp_path: Path, command: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    before = sorted(tmp_path.iterdir())
    assert evaluate([command, "arch:vit-tiny12", "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"--out {out}: " in error and "choose a folder that can be written" in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_cache_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("")
    assert evaluate(["knn", "vit-tiny12", "--random-init", "--cache", "cache", *SMALL]) == 2
    assert "error: --cache cache/features/" in capsys.readouterr().err


def test_main_itself_raises() -> None:
    with pytest.raises(RadioError, match="did you mean"):
        main(["knnn"])


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    bars = watch_on(Console(file=screen, force_terminal=True, width=100), shown=True)
    with bars("student on [scenes]", 10) as advance:
        advance(4)
        advance(6)
    assert "10/10" in screen.getvalue()
    assert "[scenes]" in screen.getvalue()


def test_the_report_file_is_plain_json(checkpoint: Path) -> None:
    main(["knn", str(checkpoint), *SMALL])
    data = json.loads((checkpoint.parent / "reports" / "knn-first.json").read_text())
    assert data["format"] == "am-radio-report/3"
    assert data["task"] == "knn"


def test_a_foreign_evaluator_that_cannot_be_imported_stops_only_its_own_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(evaluators)  # our own entries come before this test's
    info = tmp_path / "site" / "broken_evals-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-evals\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[am_radio.evaluators]\nbroken = broken_evals:make\n")
    (tmp_path / "site" / "broken_evals.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for part in ("_entries", "_plugins"):
        monkeypatch.setattr(evaluators, part, dict(getattr(evaluators, part)))
    monkeypatch.setattr(evaluators, "_plugins_read", False)
    said = "cannot be loaded: ZeroDivisionError: division by zero; mend or uninstall broken-evals"
    assert evaluate(["knn", "arch:vit-tiny12", *SMALL]) == 0
    assert "broken" not in "".join(capsys.readouterr())
    assert evaluate(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    assert said in line
    for arguments in (["broken", "arch:vit-tiny12"], ["all", "arch:vit-tiny12", "--tasks", "broken"]):
        assert evaluate(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert evaluate(["all", "nosuch.pt"]) == 2
    left_out, error = capsys.readouterr().err.splitlines()
    assert left_out.startswith("left out: ") and said in left_out and "nosuch.pt" in error


def test_settings_inside_settings_keep_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--sides", "48", "96", "--knn.scenes", "24", "12", "--knn.k", "3", "--out", "o", "--plain"]
    assert main(["resolution", "arch:vit-tiny12", *small]) == 0
    report = read(tmp_path / "o" / "resolution-vit-tiny12-untrained.json")
    assert report.settings["knn"]["k"] == [3] and report.settings["sides"] == [48, 96]
    assert "knn_top1_48px (%)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["resolution", "--help"])
    shown = capsys.readouterr().out
    assert "--knn.scenes INT INT" in shown and "--zeroshot.scenes INT" in shown


def test_noise_asks_only_what_has_luck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe's heads differ by their seeds; k-NN is exact."""
    small = ["--tasks", "knn", "seg", "--seg.scenes", "24", "12", "--seg.iterations", "4", "--repeats", "2"]
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["noise", "arch:vit-tiny12", "--out", "o", "--plain", *small, *cache]) == 0
    noise = read_noise(tmp_path / "o" / "noise.json")
    assert list(noise) == ["seg"]
    assert set(noise["seg"]) == {"miou", "macc", "aacc"}
    assert max(noise["seg"].values()) > 0
    assert "knn: exact" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["noise.json"]


def test_all_keeps_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tasks", "knn", "zeroshot", "--knn.scenes", "60", "60", "--zeroshot.scenes", "60", "--plain"]
    assert main(["all", "arch:vit-tiny12", "--out", "o", *small]) == 0
    first = capsys.readouterr().out
    assert "knn: running" in first
    assert "zeroshot: left out: vit-tiny12 has no text tower and learned from no teacher" in first
    assert main(["all", "arch:vit-tiny12", "--out", "o", *small]) == 0
    assert "knn: unchanged, kept" in capsys.readouterr().out
    with pytest.raises(RadioError, match="no task 'knm'; did you mean knn"):
        main(["all", "arch:vit-tiny12", "--tasks", "knm"])
    assert (
        main(
            [
                "all",
                "arch:vit-tiny12",
                "--out",
                "p",
                "--tasks",
                "knn",
                "--knn.bank",
                "gone",
                "--knn.query",
                "x",
            ]
        )
        == 1
    )
    assert "knn: failed: gone: no such folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "ranks", "chosen", "backend"),
    [
        ("auto", True, "cuda:1", "cpu:gloo,cuda:nccl"),
        ("cuda", True, "cuda:1", "cpu:gloo,cuda:nccl"),
        ("cpu", True, None, "gloo"),
        ("auto", False, None, "gloo"),
    ],
)
def test_each_rank_takes_its_gpu_and_shards_cross_over_nccl(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: bool, chosen: str | None, backend: str
) -> None:
    """On the default group of gloo alone FSDP's gathers would go through the host."""
    taken: list[torch.device] = []
    backends: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(commands, "joined", lambda backend="gloo": backends.append(backend))
    monkeypatch.setenv("LOCAL_RANK", "1")
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    commands._joined(RunSettings(device=device))
    assert taken == ([] if chosen is None else [torch.device(chosen)])
    assert backends == [backend]
