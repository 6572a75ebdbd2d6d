"""The protocols' numbers, and what they come to for a backbone and a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.core.task import make_evaluator
from evals.vqa.settings import (
    PRESETS,
    VqaSettings,
    choose_preset,
    choose_size,
    language_name,
    plan_stage,
)
from radio.errors import ConfigError

PAPER = PRESETS["paper"]


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        (VqaSettings(), ""),
        (VqaSettings(task="pope"), "-pope"),
        (VqaSettings(task="pope", questions=Path("pope")), "-pope"),
        (VqaSettings(task="gqa"), "-gqa"),
        (VqaSettings(task="gqa", questions=Path("q.json")), ""),
    ],
)
def test_one_benchmark_has_a_report_of_its_own(settings: VqaSettings, ending: str) -> None:
    assert make_evaluator("vqa").suffix(settings) == ending


def test_the_numbers_of_llava_15() -> None:
    first, second = PAPER.pretrain, PAPER.instruct
    assert (first.template, first.view, first.learns) == ("plain", "crop", ("projector",))
    assert (first.lr, first.batch, first.epochs, first.weight_decay, first.warmup) == (1e-3, 256, 1, 0, 0.03)
    assert (second.template, second.view, second.learns) == ("v1", "pad", ("projector", "language"))
    assert (second.lr, second.batch, second.epochs, second.weight_decay) == (2e-5, 128, 1, 0)
    assert (PAPER.sizes, PAPER.new_tokens, PAPER.longest) == ((336, 224), 128, 2048)
    plan = plan_stage(first, PAPER, VqaSettings(), 558_128)
    assert (plan.steps, plan.warmup, plan.micro_batch) == (2181, 66, 16)
    assert plan_stage(second, PAPER, VqaSettings(), 665_298).steps == 5198


def test_settings_change_a_plan() -> None:
    plan = plan_stage(
        PAPER.instruct, PAPER, VqaSettings(max_steps=10, train_batch_size=6, micro_batch=3, lr=0.5), 100
    )
    assert (plan.steps, plan.batch, plan.micro_batch, plan.lr, plan.warmup) == (10, 6, 3, 0.5, 1)
    assert plan_stage(PAPER.instruct, PAPER, VqaSettings(lora_rank=8), 100).lr == 2e-4
    assert plan_stage(PAPER.pretrain, PAPER, VqaSettings(lora_rank=8), 100).lr == 1e-3
    assert plan_stage(PAPER.pretrain, PAPER, VqaSettings(), 64).batch == 8  # few records
    scenes = PRESETS["scenes"]
    rates = [
        plan_stage(scenes.instruct, scenes, VqaSettings(), 64, opened=is_on).lr for is_on in (False, True)
    ]
    assert rates == [2e-3, 1e-4]
    with pytest.raises(ConfigError, match="a batch of 7 is no multiple of micro_batch = 2"):
        plan_stage(PAPER.pretrain, PAPER, VqaSettings(train_batch_size=7, micro_batch=2), 100)


def test_the_preset_follows_the_data_and_paper_wants_a_language_model(tmp_path: Path) -> None:
    given = VqaSettings(pretrain_data=tmp_path, instruct_data=tmp_path)
    assert choose_preset(VqaSettings())[0] == "scenes"
    assert choose_preset(given)[0] == "paper"
    assert language_name(VqaSettings(), "scenes") == "tiny"
    assert language_name(VqaSettings(language_model="smollm2"), "paper") == "smollm2"
    with pytest.raises(ConfigError, match="the preset paper needs a language model; give --language-model"):
        language_name(given, "paper")


@pytest.mark.parametrize(
    ("native", "nearest_size", "size", "noted"),
    [
        (378, lambda h, w: (round(h / 14) * 14, round(w / 14) * 14), (336, 336), False),
        (256, lambda h, w: (round(h / 32) * 32, round(w / 32) * 32), (224, 224), True),
        (256, lambda h, w: (round(h / 128) * 128, round(w / 128) * 128), (384, 384), True),
        (224, lambda h, w: (224, 224), (224, 224), True),
        (1024, lambda h, w: (1024, 1024), (1024, 1024), True),
        (96, lambda h, w: (h, w), (96, 96), False),
        (224, lambda h, w: (336, 350), (336, 350), True),
    ],
)
def test_336_then_224_then_the_nearest(
    backbone: Callable[..., Any],
    native: int,
    nearest_size: Callable[[int, int], tuple[int, int]],
    size: tuple[int, int],
    noted: bool,
) -> None:
    model = backbone()
    model.native_size, model.nearest_size = (native, native), nearest_size
    found, notes = choose_size(model, VqaSettings(), PAPER)
    assert found == size
    assert bool(notes) == noted
    if noted:
        assert f"takes {size[0]}x{size[1]}, which was used" in notes[0]


def test_a_size_that_was_asked_for(backbone: Callable[..., Any]) -> None:
    assert choose_size(backbone(), VqaSettings(size=50), PAPER) == (
        (48, 48),
        ("50 px are wanted; pooled takes 48x48, which was used",),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ()}, r"stages = \(\): name one or more of pretrain, instruct, score"),
        ({"stages": ("score", "score")}, "each once"),
        ({"stages": ("pretrain,train",)}, "name one or more of pretrain, instruct, score"),
        ({"train_batch_size": 0}, "train_batch_size: 0 is out of bounds; give a number of at least 1"),
        ({"lr": 0.0}, "lr: 0.0 is out of bounds; give a number above 0"),
        ({"scenes": (0, 1)}, r"scenes\[0\]: 0 is out of bounds"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"token_cache_gb": float("inf")}, "token_cache_gb: inf"),
        ({"training_seed": 2**70}, "training_seed: .* out of"),
        ({"lora_rank": 10**8}, "lora_rank: 100000000 is out of bounds"),
        ({"size": 10**9}, "size: 1000000000 is out of bounds"),
        ({"max_error_fraction": 1.5}, "max_error_fraction: 1.5 is out of bounds"),
        ({"pretrain_images": Path("x")}, "--pretrain-images without --pretrain-data"),
        ({"pretrain_data": Path("x")}, "--pretrain-data and --instruct-data belong together"),
        ({"task": "custom"}, r"--task custom asks questions of your own; give --questions FILE\.jsonl too"),
        ({"questions": Path("x")}, "files of a benchmark without its name; give --task too"),
        ({"predictions": Path("x"), "task": "gqa"}, "--predictions needs --task and the benchmark's files"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VqaSettings(**settings)


def test_stages_with_commas() -> None:
    assert VqaSettings(stages=("pretrain,instruct", "score")).stages == ("pretrain", "instruct", "score")


def test_the_files_of_a_benchmark() -> None:
    assert VqaSettings(task="gqa").files is None
    files = VqaSettings(task="gqa", annotations=Path("q.json")).files
    assert files is not None and (files.questions, files.annotations) == (Path("q.json"), None)
    files = VqaSettings(task="vqav2", questions=Path("q"), annotations=Path("a")).files
    assert files is not None and (files.questions, files.annotations) == (Path("q"), Path("a"))
    assert VqaSettings(task="vqav2", annotations=Path("a")).files is None
