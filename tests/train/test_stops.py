"""Runs that are stopped anywhere, in step or save, end bit for bit like one that is not."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from radio import config as settings_files
from radio import model as radio_model
from radio.dist import Ranks
from train import checkpoints as state
from train import losses, trainer
from train.config import TrainConfig
from train.distributed import DistributedStudent
from train.trainer import Trainer

from .conftest import CPU, same_weights, untimed

pytestmark = pytest.mark.slow

# Where a run may be stopped: in a step, while a state is gathered, written, hashed, named and pruned.
PLACES: tuple[tuple[ModuleType | type, str], ...] = (
    (trainer, "teacher_features"),
    (trainer, "learning_rate"),
    (losses, "teacher_losses"),
    (trainer, "moments"),
    (DistributedStudent, "gather"),
    (state, "async_save"),
    (radio_model.checkpoint, "write_bytes"),
    (state, "_sha256"),
    (state, "write_text"),
    (settings_files, "write_bytes"),
    (state, "_sync"),
    (state, "_list_states"),
)


def run_in_a_process(config: TrainConfig, stop: tuple[ModuleType | type, str, int, int] | None) -> int | None:
    """The exit code of a run of its own, stopped at the n-th call of a function by a signal."""

    def work() -> None:
        torch.set_num_threads(1)
        run = Trainer(config, Ranks(), CPU, Console(file=io.StringIO()))
        if stop is not None:
            module, name, call, number = stop
            setattr(module, name, _stopping(getattr(module, name), call, number))
        run.train()
        os._exit(85 if run.stopped else 0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def _stopping(genuine: Callable[..., Any], call: int, number: int) -> Callable[..., Any]:
    calls = iter(range(1, 10_000))

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return genuine(*arguments, **named)

    return stopping


@pytest.fixture(scope="module")
def whole() -> dict[int, Path]:
    """Run folders of undisturbed runs by number of workers, filled as they are asked for."""
    return {}


@pytest.mark.parametrize("seed", range(24))
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    config: TrainConfig,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole: dict[int, Path],
    seed: int,
) -> None:
    chance = random.Random(seed)
    workers = chance.choice((0, 1, 2))
    chosen = replace(
        config, data=replace(config.data, workers=workers), save_every=3, log_every=2, ema=0.9, keep_last=1
    )
    if not whole:
        whole[0] = tmp_path_factory.mktemp("whole") / "run"
        assert run_in_a_process(replace(chosen, out=whole[0]), None) == 0
    out, stops = tmp_path / "run", []
    for _ in range(chance.choice((1, 2))):
        module, name = chance.choice(PLACES)
        often = name in ("teacher_features", "learning_rate", "teacher_losses")
        call = chance.randint(1, 12 if often else 3)
        number = chance.choice((signal.SIGKILL, signal.SIGTERM))
        code = run_in_a_process(replace(chosen, out=out), (module, name, call, number))
        stops.append((name, call, number, code))
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 85, 0), stops  # -15: before the first step
    assert run_in_a_process(replace(chosen, out=out), None) == 0, stops
    assert untimed(out) == untimed(whole[0]), stops
    assert same_weights(out, whole[0]), stops
