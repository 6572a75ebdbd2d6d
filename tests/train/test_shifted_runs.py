"""Runs with shifted crops and MESA: against losses by hand, resumed, on several ranks, and in the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from radio.errors import ConfigError
from radio.model import build
from radio.ops import resize_features
from radio.students import ViTOptions
from radio.types import Features
from tests.train.conftest import TEACHERS, Start, read_records, same_weights, untimed
from tests.train.ranks import on_ranks
from tests.train.test_parallel import begin, check_alike
from train.config import (
    CacheConfig,
    LossConfig,
    NormaliseConfig,
    PlanOptions,
    SidesConfig,
    TeacherConfig,
    TrainConfig,
)
from train.distributed import StudentPass
from train.losses import normalised_losses, teacher_losses
from train.mesa import first_mesa_step, mesa_losses
from train.plan import make_plan
from train.setup import check_settings
from train.shift import Frames, Input, Shifts, cut, make_frames, overlap
from train.trainer import Trainer

STD = 0.3  # shifts of up to one patch: the teachers have grids of 5 x 5 and 4 x 4, the student of 4 x 4
SAM = TeacherConfig(name="sam", model="scenes:sam", summary_weight=0.0, mosaic=True)


@pytest.fixture
def shifted(config: TrainConfig) -> TrainConfig:
    """Six steps with shifts, MESA from the second on."""
    return replace(
        config,
        teachers=TEACHERS[:2],
        loss=LossConfig(shift=STD),
        ema=0.9,
        mesa=0.5,
        mesa_start=0.2,
        steps=6,
        save_every=3,
    )


def shows_a_shift(run: Trainer, step: int) -> bool:
    """Whether teachers and student have different shifts in a step."""
    assert run.framing is not None
    student, average, teachers = run.framing.at(run.groups[0], step)
    return len({student.shift, average.shift, *(frame.shift for frame in teachers.values())}) > 1


def test_every_model_sees_its_own_frame_and_is_compared_where_frames_overlap(
    shifted: TrainConfig, start: Start
) -> None:
    run = start(shifted)
    assert run.sides == ({48: 96},)  # 64 + 2 * 16: dense's patch is the largest
    canvases: list[Tensor] = []
    teach = run.run_teachers

    def watch(step: int, group: Any, images: Tensor) -> dict[str, Features]:
        canvases.append(images)
        return teach(step, group, images)

    run.run_teachers = watch  # type: ignore[method-assign]
    seen_shift = False
    for step, batch in zip(range(3), run.loader.batches(0, watch, ahead=False), strict=False):
        (part,) = batch.groups
        frames, canvas = part.frames, canvases[step]
        assert frames is not None and canvas.shape[-2:] == (96, 96)
        assert torch.equal(part.images, cut(canvas, frames.student)) and part.images.shape[-1] == 48
        assert part.second is not None and torch.equal(part.second, cut(canvas, frames.average))
        view = run.model(part.images)
        for name in ("clip", "dense"):
            teacher = run.teachers[name](cut(canvas, frames.teachers[name]))
            assert torch.equal(part.targets[name].tokens, teacher.tokens)
            own, other = overlap(frames.student, frames.teachers[name])
            student = run.model.adapt(name, resize_features(view, own))
            target = resize_features(teacher, other)
            wanted = teacher_losses(student, target, shifted.loss)
            found = run.loss(run.student.encode, part, None, False).parts
            assert float(found[f"{name}/spatial"]) == pytest.approx(
                float(wanted.spatial.mean().detach()), abs=1e-6
            )
            summary = teacher_losses(
                run.model.adapt(name, view), teacher._replace(tokens=teacher.tokens[:, :16]), shifted.loss
            )
            assert float(found[f"{name}/summary"]) == pytest.approx(
                float(summary.summary.mean().detach()), abs=1e-6
            )
        seen_shift |= shows_a_shift(run, step)
    assert seen_shift


@pytest.mark.parametrize("resample", ["before", "after"])
def test_teachers_maps_are_normalised_wherever_they_are_sampled(
    shifted: TrainConfig, start: Start, resample: Any
) -> None:
    """The sampled map of normalised tokens is the normalised map of sampled ones; the head may come first."""
    run = start(
        replace(shifted, adaptor=replace(shifted.adaptor, resample=resample)),
        normalise=NormaliseConfig(kind="phi-s", steps=2),
        steps=2,
    )
    run.train()
    (part,) = next(run.loader.batches(0, run.run_teachers, ahead=False)).groups
    assert part.frames is not None
    found = run.loss(run.student.encode, part, None, False).parts
    view = run.model(part.images)
    for name in ("clip", "dense"):
        normaliser, _ = run.loss.statistics.of(name, name)
        assert normaliser is not None
        own, other = overlap(part.frames.student, part.frames.teachers[name])
        student = run.model.adapt(name, view, own)
        target = resize_features(part.targets[name], other)
        wanted = normalised_losses(student.tokens, target.tokens, normaliser)
        assert float(found[f"{name}/spatial"]) == pytest.approx(float(wanted.mean().detach()), abs=1e-6)


def stop_after(run: Trainer, steps: int) -> None:
    asked = iter([False] * (steps - 1) + [True])
    run.stop.agreed = lambda: next(asked)  # type: ignore[method-assign]
    run.train()
    assert run.stopped and run.step == steps


def test_a_stopped_run_goes_on_with_the_same_shifts_and_mosaics(
    shifted: TrainConfig, start: Start, tmp_path: Path
) -> None:
    config = replace(shifted, teachers=(TEACHERS[0], SAM))
    start(config, out=tmp_path / "whole").train()
    stop_after(start(config, out=tmp_path / "parts"), 4)
    start(config, out=tmp_path / "parts").train()
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    records = read_records(tmp_path / "whole")
    assert ["mesa" in record for record in records] == [False] + 5 * [True]
    assert all(record["mesa"] > 0 for record in records[1:])


def test_several_resolutions_have_canvases_of_their_own(shifted: TrainConfig, start: Start) -> None:
    run = start(shifted, resolutions=SidesConfig(sides=(48, 60)))
    assert run.sides == ({48: 96, 60: 96},)
    run.train()
    assert run.framing is not None
    sides = {step: run.groups[0].side_at(shifted.seed, step) for step in range(6)}
    assert set(sides.values()) == {48, 60}
    for step, side in sides.items():
        assert run.framing.at(run.groups[0], step).student.input == Input((side, side), 12)


def test_ranks_and_accumulation_change_nothing(shifted: TrainConfig, start: Start, tmp_path: Path) -> None:
    """At this rate AdamW does not blow the rounding of tiny gradients up."""
    shifted = replace(shifted, optim=replace(shifted.optim, lr=2e-5))
    start(shifted, out=tmp_path / "one").train()
    start(shifted, out=tmp_path / "parts", grad_accum_steps=2).train()
    check_alike(tmp_path / "one", tmp_path / "parts")
    on_ranks(
        2, tmp_path / "ranks", lambda group: begin(shifted, group, out=tmp_path / "two").train() and None
    )
    check_alike(tmp_path / "one", tmp_path / "two")
    for one, two in zip(*(read_records(tmp_path / out) for out in ("one", "two")), strict=True):
        assert two.get("mesa", 0.0) == pytest.approx(one.get("mesa", 0.0), abs=1e-5)


def test_settings_that_are_off_change_nothing(config: TrainConfig, start: Start) -> None:
    run = start(config)
    (part,) = next(run.batches()).groups
    assert run.framing is None and part.frames is None and part.second is None
    assert run.averaged is None


def layer_norm_by_hand(token: Tensor) -> Tensor:
    return (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()


def test_mesa_is_the_squared_error_of_normed_tokens() -> None:
    student, average = (
        Features(torch.zeros(1, 1), torch.tensor(tokens).view(1, 2, 2), (1, 2))
        for tokens in ([[1.0, 3.0], [2.0, 2.0]], [[5.0, 1.0], [0.0, 8.0]])
    )
    # (-1, 1) against (1, -1), and (0, 0) against (-1, 1): (4 + 4 + 1 + 1) / 4
    assert float(mesa_losses(student, average, None)) == pytest.approx(2.5, abs=1e-4)


def test_mesa_compares_the_overlap_only() -> None:
    side, shifts = Input((96, 96), 16), Shifts((1, 0), (-1, 1), {})
    frames: Frames = make_frames(0.5, side, {}, shifts)
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 36, 5, generator=draw) for _ in range(2)]
    student, average = (Features(tokens[:, 0], tokens, (6, 6)) for tokens in maps)
    found = mesa_losses(student, average, frames)
    errors: list[list[Tensor]] = [[], []]
    for image in range(2):
        for y in range(4):  # the student's row y shows what the other's row y + 2 does
            for x in range(1, 6):
                a = layer_norm_by_hand(maps[0][image].view(6, 6, 5)[y, x])
                b = layer_norm_by_hand(maps[1][image].view(6, 6, 5)[y + 2, x - 1])
                errors[image].append((a - b).square().mean())
    torch.testing.assert_close(found, torch.stack([torch.stack(each).mean() for each in errors]))


@pytest.mark.parametrize("window", [None, 2])
def test_the_averaged_student_is_the_student_with_its_weights(
    shifted: TrainConfig, start: Start, window: int | None
) -> None:
    student = "vitdet-tiny12" if window else "vit-tiny12"
    run = start(shifted, student=student)
    assert run.average is not None and run.averaged is not None
    with torch.no_grad():
        for tensor in run.average.tensors.values():
            tensor.add_(0.1)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = run.averaged.encode(images, window)
    twin = build(run.model.config, 1)
    twin.load_state_dict({**run.model.state_dict(), **run.average.tensors})
    assert torch.equal(found.tokens, StudentPass(twin.student)(images, None, window).tokens)
    assert not found.tokens.requires_grad
    assert not torch.equal(found.tokens, run.model(images).tokens)


def test_mesa_of_identical_weights_on_the_same_crop_is_nothing(shifted: TrainConfig, start: Start) -> None:
    run = start(shifted, loss=LossConfig(), options=ViTOptions(cpe=False))
    (part,) = next(run.batches()).groups
    assert part.frames is None and part.second is None
    assert float(run.loss(run.student.encode, part, None, False, run.averaged).parts["mesa"]) == 0


def test_mesa_is_added_by_its_weight_and_moves_the_student_alone(shifted: TrainConfig, start: Start) -> None:
    run = start(shifted)
    (part,) = next(run.batches()).groups
    weight = run.model.get_parameter("student.blocks.0.attn.qkv.weight")
    found = []
    for average in (None, run.averaged):
        run.loss.zero_grad()
        losses = run.loss(run.student.encode, part, None, False, average)
        losses.total.backward()
        assert weight.grad is not None
        found.append((losses, weight.grad.clone()))
    (plain, without), (both, combined) = found
    added = float((both.total - plain.total).detach())
    assert added == pytest.approx(0.5 * float(both.parts["mesa"]), abs=1e-5) and added > 0
    assert part.frames is not None and run.averaged is not None and part.second is not None
    distance = mesa_losses(run.model(part.images), run.averaged.encode(part.second, None), part.frames)
    (alone,) = torch.autograd.grad(0.5 * distance.mean(), weight)
    torch.testing.assert_close(combined, without + alone, rtol=0, atol=1e-6)


def test_batch_norms_count_only_what_the_student_sees(shifted: TrainConfig, start: Start) -> None:
    run = start(shifted, student="timm:resnetv2_18", resolution=128, teachers=TEACHERS[:1])
    norms = {name: b.clone() for name, b in run.model.student.named_buffers()}  # type: ignore[attr-defined]
    assert run.averaged is not None and norms
    run.averaged.encode(torch.rand(2, 3, 128, 128), None)
    for name, buffer in run.model.student.named_buffers():  # type: ignore[attr-defined]
        assert torch.equal(buffer, norms[name]), name


def test_a_frozen_trunk_waits_with_mesa(shifted: TrainConfig) -> None:
    assert first_mesa_step(shifted) == 1
    assert first_mesa_step(replace(shifted, freeze_trunk_steps=4)) == 4
    assert first_mesa_step(replace(shifted, mesa_start=0.99)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": CacheConfig(folder=Path("cache"))}, "--loss.shift 0.3: shifts change from step to step"),
        ({"ema": 0.0}, "--mesa 0.5 compares the student with the average .* give --ema 0.9996"),
        ({"parallel": "fsdp"}, "--mesa calls the averaged student .* take --parallel ddp"),
        ({"mesa": 0.0}, "--mesa-start is for --mesa"),
        ({"loss": LossConfig(shift=-0.1)}, "shift"),
        ({"loss": LossConfig(shift=0.14)}, "--loss.shift 0.14 is rounded to a whole patch in fewer than one"),
        ({"mesa_start": 1.0}, "mesa.start"),
    ],
)
def test_settings_without_a_meaning_are_one_error(
    shifted: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(replace(shifted, **changes), 2)


def test_a_teacher_of_too_few_patches_is_refused_before_the_first_step(
    shifted: TrainConfig, start: Start
) -> None:
    message = r"--loss.shift 0.3: teacher sam has 1 x 1 patches, .* leave it out, or give a larger resolution"
    with pytest.raises(ConfigError, match=message):
        start(shifted, teachers=TEACHERS)
    with pytest.raises(ConfigError, match=message):
        make_plan(replace(shifted, teachers=TEACHERS), PlanOptions(world=1))


def test_tokens_that_are_no_patches_are_one_error(shifted: TrainConfig, start: Start) -> None:
    run = start(shifted)
    (part,) = next(run.batches()).groups
    odd = part.targets["clip"]._replace(grid=(1, 25))
    wrong = part._replace(targets={**part.targets, "clip": odd})
    with pytest.raises(ConfigError, match=r"teacher clip has a grid of 1 x 25, and 50 x 50 px are 5 x 5"):
        run.loss(run.student.encode, wrong, None, False)


def test_the_plan_counts_canvas_sampling_and_averaged_student(shifted: TrainConfig) -> None:
    def cost(**changes: Any) -> Any:
        (found,) = make_plan(replace(shifted, **changes), PlanOptions(world=1)).costs.values()
        return found

    plain = cost(loss=LossConfig(), mesa=0.0, mesa_start=0.1)
    shift, both = cost(mesa=0.0, mesa_start=0.1), cost()
    assert shift.teacher_flops == plain.teacher_flops  # a teacher sees as many pixels
    images = shifted.batch_size * 3 * 4
    assert shift.inputs - plain.inputs == images * (96**2 - 64**2)
    assert both.forward_flops > 1.5 * shift.forward_flops and both.backward_flops == shift.backward_flops
    assert both.teacher_flops == shift.teacher_flops
