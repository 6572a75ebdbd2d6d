"""All ranks stop after the same step, whichever of them was asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch import Tensor

from radio.config import write_yaml
from radio.dist import Ranks
from train.cli import main
from train.config import NormaliseConfig, StageConfig, TrainConfig
from train.data.loader import Batch, outlast_signals
from train.distributed import REQUEUE, PreemptedError, Preemption
from train.normalise import TargetStatistics
from train.trainer import Trainer

from .conftest import read_records, same_weights, untimed
from .ranks import on_ranks


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_one_process_stops_at_once(name: signal.Signals) -> None:
    before = signal.getsignal(name)
    with Preemption(Ranks()) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), name)
        assert stop.agreed()
    assert signal.getsignal(name) == before


def test_an_error_inside_is_let_through() -> None:
    with pytest.raises(ZeroDivisionError), Preemption(Ranks()):
        _ = 1 // 0


def test_ranks_stop_one_step_after_any_was_asked(tmp_path: Path) -> None:
    def work(group: Ranks) -> int:
        with Preemption(group) as stop:
            for step in range(1, 20):
                if (group.rank, step) == (1, 4):
                    os.kill(os.getpid(), signal.SIGUSR1)
                if stop.agreed():
                    return step
        return 0

    assert on_ranks(3, tmp_path, work) == [5, 5, 5]


def test_ranks_that_are_not_asked_leave_together(tmp_path: Path) -> None:
    def work(group: Ranks) -> bool:
        with Preemption(group) as stop:
            return any(stop.agreed() for _ in range(3))

    assert on_ranks(2, tmp_path, work) == [False, False]


def test_ranks_leave_what_is_watched_together(tmp_path: Path) -> None:
    def work(group: Ranks) -> list[int]:
        seen = []
        with Preemption(group) as stop, suppress(PreemptedError):
            for item in stop.watch(range(20)):
                seen.append(item)
                if (group.rank, item) == (1, 4):
                    os.kill(os.getpid(), signal.SIGTERM)
        return seen

    assert on_ranks(2, tmp_path, work) == [list(range(6))] * 2


def test_signals_are_handled_from_the_outer_entry_to_its_end_but_in_pauses() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with Preemption(Ranks()) as stop:
            with stop.paused():
                os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
            with stop:
                pass
            assert not stop.agreed()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] * 2


def test_a_signal_while_teachers_are_measured_ends_with_the_code_in_every_stage(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first measured step of each stage gets the signal; the next start measures anew."""
    measured = replace(
        config, steps=2, normalise=NormaliseConfig(kind="phi-s", steps=2), stages=(StageConfig(steps=2),)
    )
    write_yaml(measured, config.out.with_suffix(".yaml"))
    words = [str(config.out.with_suffix(".yaml")), "--out"]
    genuine, calls = TargetStatistics.add, iter(range(1, 1000))

    def signalled(self: TargetStatistics, batch: Batch) -> None:
        if next(calls) in (1, 4):  # the first of stage 1, and after two more the first of stage 2
            os.kill(os.getpid(), signal.SIGTERM)
        genuine(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TargetStatistics, "add", signalled)
        codes = [main([*words, str(config.out)]) for _ in range(3)]
    assert codes == [REQUEUE, REQUEUE, 0]
    whole = config.out.with_name("whole")
    assert main([*words, str(whole)]) == 0
    assert same_weights(config.out, whole)
    assert untimed(config.out) == untimed(whole)


def answering(line: Connection) -> None:
    """A loader's process, as far as signals go."""
    outlast_signals(0)
    while True:
        line.send("here")
        line.recv()


def test_a_loaders_process_heeds_its_own_trainer_alone() -> None:
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=answering, args=(its,))
    process.start()
    assert ours.recv() == "here"
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    time.sleep(0.05)
    ours.send("and now?")
    assert ours.poll(5)
    process.terminate()
    process.join(5)
    assert process.exitcode == 0


def test_the_code_is_none_that_shells_or_we_use_otherwise() -> None:
    assert REQUEUE == 85


def test_the_command_ends_with_the_code_and_goes_on_from_there(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yaml(config, config.out.with_suffix(".yaml"))
    words = [str(config.out.with_suffix(".yaml")), "--steps", "3"]
    genuine = Trainer.train_step

    def signalled(self: Trainer, batch: Batch) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return genuine(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        codes = [main(words) for _ in range(2)]
    assert codes == [REQUEUE, REQUEUE]
    assert (
        f"stopped after step 2 of {config.out}; the same command goes on from there"
        in capsys.readouterr().out
    )
    assert main(words) == 0
    assert [record["step"] for record in read_records(config.out)] == [1, 2, 3]
