from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.core.evaluator import EvalRun, Evaluator, Result, RunSettings
from evals.core.report import Metric, read
from evals.core.suite import Outcome, run_all
from radio.dist import Ranks
from radio.errors import CheckpointError, DataError, RadioError
from radio.progress import no_progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the fake tasks can be told."""

    data: Path | None = None
    k: int = 1


class Task:
    """Scores the number of times that it ran; fails or is killed when told to."""

    settings = Settings

    def __init__(self, name: str, lack: str = "") -> None:
        self.name, self.lack, self.runs = name, lack, 0
        self.error: BaseException | None = None

    def missing_requirements(self, model: Any) -> str:
        return self.lack

    def evaluator(self) -> Evaluator[Settings]:
        return Evaluator(
            name=self.name,
            settings=Settings,
            evaluate=self.evaluate,
            missing_requirements=lambda model: self.missing_requirements(model),
        )

    def evaluate(self, model: Any, settings: Settings, run: EvalRun) -> Result:
        self.runs += 1
        if self.error is not None:
            raise self.error
        return Result(metrics={"runs": Metric(value=self.runs)}, records=[{"id": 0, "score": 1}])


@pytest.fixture
def tasks() -> dict[str, Task]:
    return {"a": Task("a"), "b": Task("b"), "c": Task("c", lack="has no text tower")}


@pytest.fixture
def everything(
    tasks: dict[str, Task], tmp_path: Path, backbone: Callable[..., Any]
) -> Callable[..., list[Outcome]]:
    said: list[str] = []

    def run(model: Any = None, shared: RunSettings | None = None, **settings: Settings) -> list[Outcome]:
        jobs = {name: (task.evaluator(), settings.get(name, Settings())) for name, task in tasks.items()}
        return run_all(
            model or backbone(),
            jobs,
            tmp_path / "out",
            run=shared or RunSettings(),
            name="m",
            progress=no_progress,
            ranks=Ranks(),
            log=said.append,
        )

    return run


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def test_each_task_runs_once_and_is_kept(everything: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    outcomes = everything()
    assert states(outcomes) == ["done", "done", "left out"]
    assert outcomes[2].reason == "has no text tower"
    again = everything()
    assert states(again) == ["kept", "kept", "left out"]
    assert again[0].report == outcomes[0].report == read(tmp_path / "out" / "a-m.json")
    assert tasks["a"].runs == 1


def test_other_weights_settings_or_data_are_scored_again(
    everything: Any, tmp_path: Path, backbone: Callable[..., Any]
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(b"1")
    first = {"a": Settings(data=tmp_path / "d")}
    everything(**first)
    assert states(everything(**first))[:2] == ["kept", "kept"]
    (tmp_path / "d" / "y.png").write_bytes(b"2")
    assert states(everything(**first))[:2] == ["done", "kept"]
    assert states(everything(a=replace(first["a"], k=2)))[:2] == ["done", "kept"]
    assert states(everything(backbone(seed=1), a=replace(first["a"], k=2)))[:2] == ["done", "done"]


def test_only_the_protocols_part_of_the_common_settings_counts(everything: Any, tmp_path: Path) -> None:
    cache = tmp_path / "own"
    cache.mkdir()
    everything(shared=RunSettings(cache=cache))
    (cache / "features").write_bytes(b"what a task leaves there")
    assert states(everything(shared=RunSettings(cache=cache, workers=1, batch_size=2)))[:2] == ["kept"] * 2
    assert states(everything(shared=RunSettings(cache=cache, limit=5)))[:2] == ["done"] * 2


@pytest.mark.parametrize("harm", ["report", "records", "state"])
def test_what_is_gone_or_damaged_is_made_again(everything: Any, tmp_path: Path, harm: str) -> None:
    everything()
    if harm == "report":
        path = tmp_path / "out" / "a-m.json"
        path.write_text(path.read_text().replace('"value": 1', '"value": 7'))
    elif harm == "records":
        (tmp_path / "out" / "a-m.jsonl").unlink()
    else:
        (tmp_path / "out" / "all.json").write_text("{")
    assert states(everything())[0] == "done"


@pytest.mark.parametrize("error", [DataError("no such folder"), RuntimeError("out of luck"), KeyError("x")])
def test_a_failing_task_does_not_stop_the_others(
    everything: Any, tasks: dict[str, Task], error: Exception
) -> None:
    tasks["a"].error = error
    outcomes = everything()
    assert states(outcomes) == ["failed", "done", "left out"]
    assert str(error) in outcomes[0].reason
    tasks["a"].error = None
    assert states(everything()) == ["done", "kept", "left out"]


def test_an_interruption_leaves_what_is_done(everything: Any, tasks: dict[str, Task]) -> None:
    tasks["b"].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        everything()
    tasks["b"].error = None
    assert states(everything()) == ["kept", "done", "left out"]
    assert tasks["a"].runs == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        '{"format": "am-radio-all/1", "tasks": {"a": 1}}',
        '{"tasks": {"a": {"key": 5}}}',
        "\ufeff",
    ],
)
def test_a_foreign_state_is_no_state(everything: Any, tmp_path: Path, text: str) -> None:
    everything()
    (tmp_path / "out" / "all.json").write_text(text)
    assert states(everything())[:2] == ["done", "done"]


def test_what_a_task_needs_and_cannot_be_read_stops_no_other(everything: Any, tasks: dict[str, Task]) -> None:
    def lacks(model: Any) -> str:
        raise CheckpointError("clip.pt: no such file")

    tasks["a"].missing_requirements = lacks  # type: ignore[method-assign]
    outcomes = everything()
    assert states(outcomes) == ["failed", "done", "left out"]
    assert outcomes[0].reason == "clip.pt: no such file"


def test_a_full_gpu_is_said_and_emptied_for_the_next(
    everything: Any, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("now"))
    tasks["a"].error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. See docs")
    first, second, _ = everything()
    assert first.reason.startswith("the GPU's memory is full (CUDA out of memory)")
    assert "smaller --batch-size" in first.reason
    assert second.state == "done" and emptied == ["now"]


def test_with_several_ranks_a_failure_of_one_ends_all(
    tasks: dict[str, Task], tmp_path: Path, backbone: Any
) -> None:
    tasks["a"].error = RuntimeError("only here")
    jobs = {"a": (tasks["a"].evaluator(), Settings())}
    with pytest.raises(RadioError, match="a: failed on rank 1 of 2: RuntimeError: only here"):
        run_all(
            backbone(),
            jobs,
            tmp_path,
            run=RunSettings(),
            name="m",
            progress=no_progress,
            ranks=Ranks(1, 2),
            log=lambda line: None,
        )


def test_settings_that_name_links_to_nowhere_and_endless_names(everything: Any, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d" / "loop")
    settings = {"a": Settings(data=tmp_path / "d"), "b": Settings(data=Path("x" * 5000))}
    assert states(everything(**settings))[:2] == ["done", "done"]
    assert states(everything(**settings))[:2] == ["kept", "kept"]
