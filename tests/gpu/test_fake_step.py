"""A whole training step on a GPU that is not there: no two devices meet, and the host waits for nothing.

The backward is replaced by gradients of the right shape and place: autograd wants a real device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from radio.dist import Ranks
from radio.model import ModelConfig, RadioModel
from radio.students import StudentOptions
from radio.types import Features
from train import trainer as module
from train.config import BalanceConfig, DataConfig, LossConfig, OptimConfig, TeacherConfig, TrainConfig
from train.data.loader import Batch, GroupBatch
from train.losses import Balancer, make_balancer
from train.setup import TeacherFacts
from train.trainer import Trainer

from .fake import GPU, on_gpu, pretend

TEACHERS = (
    TeacherConfig(name="clip", model="-"),
    TeacherConfig(name="dino", model="-", summary_weight=0.5),
    TeacherConfig(name="sam", model="-", student_resolution=144, batch_size=4, summary_weight=0.0),
)
FACTS = {teacher.name: TeacherFacts("", {96: (96, 96), 144: (96, 96)}, 5, 7, 12) for teacher in TEACHERS}
CONFIG = TrainConfig(
    recipe="fake",
    student="vit-tiny12",
    teachers=TEACHERS,
    resolution=96,
    steps=1,
    batch_size=8,
    out=Path("nowhere"),
    data=DataConfig(scenes=8),
    precision="fp32",  # autocast for CUDA asks whether there is a GPU
    ema=0.9,
    log_every=1,
)


class Event:
    """A CUDA event on a machine without CUDA."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        """Nothing."""


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Make a step of the trainer that is put into the list possible without a GPU, and watch its copies."""
    pinned: list[Tensor] = []
    trainers: list[Trainer] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    def to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        aims = [each.device if isinstance(each, Tensor) else each for each in (*arguments, *named.values())]
        if trainers and tensor.device.type == "cpu" and GPU in aims:
            assert named.get("non_blocking"), "a copy that the host waits for"
            assert any(tensor is each for each in pinned), "a copy from pageable memory waits for the stream"
        return moved(tensor, *arguments, **named)

    def new_tensor(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        assert not trainers or tensor.device.type == "cpu", "a copy from pageable memory waits for the stream"
        return made(tensor, *arguments, **named)

    def backward(tensor: Tensor, *_: Any, **__: Any) -> None:
        assert tensor.device == GPU
        assert tensor.ndim == 0
        for parameter in trainers[-1].loss.parameters():
            parameter.grad = torch.empty_like(parameter)

    moved, made = Tensor.to, Tensor.new_tensor
    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(module, "make_balancer", real_balancer)
    monkeypatch.setattr(module, "build", built)
    monkeypatch.setattr(module, "gather_facts", facts_of)
    monkeypatch.setattr(module, "memory_of", lambda device: 10**12)
    return trainers


def facts_of(config: TrainConfig, *_: Any) -> dict[str, TeacherFacts]:
    """The facts of the run's teachers, which there are none of."""
    return {teacher.name: FACTS[teacher.name] for teacher in config.teachers}


def built(described: ModelConfig, *_: Any) -> RadioModel:
    """Make the model on the fake GPU."""
    model = on_gpu(lambda: RadioModel(described))
    model.to = lambda *_: model  # type: ignore[method-assign]  # fake weights cannot be moved
    return model


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, Ranks(), GPU, Console(quiet=True), teachers={})


def real_balancer(*arguments: Any) -> Balancer:
    """Make a balancer of real tensors: fake ones are not always moved."""
    with unset_fake_temporarily():
        return make_balancer(*arguments)


def batch_of(trainer: Trainer) -> Batch:
    batches = []
    for group in trainer.groups:
        known = Features(
            torch.rand(group.share, 5, device=GPU), torch.rand(group.share, 35, 7, device=GPU), (5, 7)
        )
        images = torch.rand(group.share, 3, *group.sides, *group.sides, device=GPU)
        batches.append(GroupBatch(group, images, dict.fromkeys(group.teachers, known)))
    return Batch(tuple(batches), 0.0)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"grad_accum_steps": 2},
    "uncertainty": {"balance": BalanceConfig(kind="uncertainty")},
    "adaloss": {"balance": BalanceConfig(kind="adaloss")},
    "amtml": {"balance": BalanceConfig(kind="amtml"), "teachers": TEACHERS[:2]},
    "angle": {"loss": LossConfig(summary="angle", dispersion="running")},
    "per-teacher": {"summary": "per-teacher"},
    "mean": {"summary": "mean", "loss": LossConfig(cosine=0.5, smooth_l1_beta=0.1)},
    "no clipping": {"optim": OptimConfig(clip=0.0), "ema": 0.0},
    "e-radio": {"student": "e-radio-tiny", "options": StudentOptions(activation_checkpointing=True)},
    "timm": {"student": "timm:efficientvit_l1", "teachers": TEACHERS[:2]},
}


@pytest.mark.parametrize(
    "way", [*list(WAYS)[:5], *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[5:])]
)
def test_a_step_meets_one_device_and_waits_for_nothing(
    way: str, trainers: list[Trainer], tmp_path: Path
) -> None:
    config = replace(CONFIG, out=tmp_path / "run", **WAYS[way])
    with pretend():
        trainer = trainer_of(config)
        trainers.append(trainer)
        for _ in range(config.steps):
            fine = trainer.train_step(batch_of(trainer))
            losses, total, norm = trainer.compute_gradients(batch_of(trainer))
            assert total.device == norm.device == fine.device == GPU
            assert all(each.total.device == GPU for each in losses)
        assert all(tensor.device == GPU for name, tensor in trainer.state_tensors().items())
