"""A whole training step on a GPU that is not there: no two devices meet, and the host waits for nothing.

The backward is replaced by gradients of the right shape and place: autograd wants a real device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from radio.dist import Group
from radio.model import RadioModel
from radio.students import StudentOptions
from radio.types import Features
from train import monitor as stopwatch
from train.assembly import TeacherFacts, model_config
from train.balancing import Balancer, make_balancer
from train.batches import Batch, GroupBatch
from train.config import BalanceConfig, LossConfig, OptimConfig, TeacherConfig, TrainConfig
from train.learner import Learner
from train.monitor import Meters, NonFiniteMonitor
from train.partition import make_partition

from .fake import GPU, on_gpu, pretend

TEACHERS = (
    TeacherConfig(name="clip", model="-"),
    TeacherConfig(name="dino", model="-", summary_weight=0.5),
    TeacherConfig(name="sam", model="-", student_resolution=144, batch_size=4, summary_weight=0.0),
)
FACTS = {teacher.name: TeacherFacts("", (96, 96), 5, 7) for teacher in TEACHERS}
CONFIG = TrainConfig(
    recipe="fake",
    student="vit-tiny12",
    teachers=TEACHERS,
    resolution=96,
    steps=1,
    batch_size=8,
    out=Path("nowhere"),
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
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    """Make a step of the learner that is put into the list possible without a GPU, and watch its copies."""
    pinned: list[Tensor] = []
    learners: list[Learner] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    def to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        aims = (*arguments, *named.values())
        if learners and tensor.device.type == "cpu" and GPU in aims:
            assert named.get("non_blocking"), "a copy that the host waits for"
            assert any(tensor is each for each in pinned), "a copy from pageable memory waits for the stream"
        return moved(tensor, *arguments, **named)

    def backward(tensor: Tensor, *_: Any, **__: Any) -> None:
        assert tensor.device == GPU
        assert tensor.ndim == 0
        for parameter in learners[-1].distiller.parameters():
            parameter.grad = torch.empty_like(parameter)

    moved = Tensor.to
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(stopwatch.torch.cuda, "Event", Event)
    return learners


def learner_of(config: TrainConfig) -> Learner:
    partition = make_partition(config, 1)
    model = on_gpu(lambda: RadioModel(model_config(config, FACTS))).train()
    sides = {group.side: () for group in partition.groups}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.learner.make_balancer", real_balancer)
        return Learner(model, sides, config, partition, Group(), GPU)


def real_balancer(*arguments: Any) -> Balancer:
    """Make a balancer of real tensors: fake ones are not always moved."""
    with unset_fake_temporarily():
        return make_balancer(*arguments)


def batch_of(learner: Learner) -> Batch:
    lessons = []
    for group in learner.partition.groups:
        known = Features(
            torch.rand(group.share, 5, device=GPU), torch.rand(group.share, 35, 7, device=GPU), (5, 7)
        )
        images = torch.rand(group.share, 3, group.side, group.side, device=GPU)
        lessons.append(GroupBatch(group, images, dict.fromkeys(group.teachers, known)))
    return Batch(tuple(lessons), (), 0.0)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"grad_accum_steps": 2},
    "uncertainty": {"balance": BalanceConfig(kind="uncertainty")},
    "adaloss": {"balance": BalanceConfig(kind="adaloss")},
    "amtml": {"balance": BalanceConfig(kind="amtml"), "teachers": TEACHERS[:2]},
    "per-teacher": {"summary": "per-teacher"},
    "mean": {"summary": "mean", "loss": LossConfig(cosine=0.5, smooth_l1_beta=0.1)},
    "no clipping": {"optim": OptimConfig(clip=0.0), "ema": 0.0},
    "e-radio": {"student": "e-radio-tiny", "options": StudentOptions(activation_checkpointing=True)},
    "timm": {"student": "timm:efficientvit_l1", "teachers": TEACHERS[:2]},
}


@pytest.mark.parametrize(
    "way", [*list(WAYS)[:4], *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[4:])]
)
def test_a_step_meets_one_device_and_waits_for_nothing(way: str, learners: list[Learner]) -> None:
    config = replace(CONFIG, **WAYS[way])
    with pretend():
        learner = learner_of(config)
        learners.append(learner)
        meters, guard = Meters(), NonFiniteMonitor(GPU)
        for step in range(config.steps):
            learned, fine = learner.advance(batch_of(learner), step)
            guard.update(fine, [losses.parts for losses in learned.losses])
            meters.add({"loss": learned.total, "grad_norm": learned.norm}, fine)
            for losses in learned.losses:
                meters.add(losses.parts, fine)
                meters.add(losses.details, fine)
            assert learned.total.device == learned.norm.device == fine.device == GPU
        assert all(tensor.device == GPU for name, tensor in learner.tensors().items())
