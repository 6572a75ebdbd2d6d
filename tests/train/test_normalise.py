"""Normalised targets and the balanced angular loss: their scale, ranks, resuming, and folded checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from radio import checkpoint
from radio.dist import Ranks
from radio.errors import ConfigError, RadioError
from radio.hub import load_teacher
from radio.model import load
from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics, Normalisation
from radio.ops import angle, resize_images
from radio.types import Features
from train.commands import plan
from train.config import CacheConfig, LossConfig, NormaliseConfig, PlanOptions, StageConfig, TrainConfig
from train.data.loader import Batch, GroupBatch
from train.groups import TeacherGroup
from train.losses import normalised_losses, teacher_losses, unexplained
from train.normalise import Dispersion, TargetStatistics, check_loss_weights
from train.recipes import smoke
from train.stages import check_stages
from train.trainer import Trainer

from .conftest import CPU, TEACHERS, Start, losses_of, read_records, same_weights, untimed
from .ranks import on_ranks
from .test_balanced_runs import stop_at

KINDS: tuple[Normalisation, ...] = ("phi-s", "global", "channel", "pca", "zca")
ANGLE = LossConfig(summary="angle")


def alone(tensor: Tensor) -> Tensor:
    """The sum and the mean over a single rank."""
    return tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(tokens: Tensor, kind: Normalisation = "phi-s") -> FeatureNormaliser:
    statistics = FeatureStatistics(tokens.shape[-1])
    statistics.update(tokens)
    return FeatureNormaliser.fit(statistics, kind)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1.0, 0.0], [5.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 3.0], math.pi / 2),
        ([1.0, 0.0], [-2.0, 0.0], math.pi),
        ([3.0, 4.0], [4.0, 3.0], math.acos(24 / 25)),
        ([0.0, 0.0], [1.0, 1.0], math.pi / 2),
    ],
)
def test_angles(a: list[float], b: list[float], wanted: float) -> None:
    assert angle(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("turn", [0.0, 1e-4, 0.3, 3.0, math.pi])
def test_gradients_of_squared_angles_are_twice_the_angle(turn: float) -> None:
    """On a unit circle the squared angle grows by 2 angle; the arc cosine's formula divides by zero."""
    x = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64, requires_grad=True)
    angle(x, torch.tensor([1.0, 0.0], dtype=torch.float64)).square().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    if turn < math.pi:  # there is no gradient where all ways lead back
        assert float(x.grad.norm()) == pytest.approx(2 * turn, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", [0.03, 1.0, 5.5])
def test_predicting_the_mean_direction_costs_one(scale: float) -> None:
    summaries = scale * (draw(500, 12) + 0.4)
    dispersion = Dispersion(12)
    assert dispersion().item() == 1.0  # nothing is known yet
    dispersion.add(summaries, alone)
    centre = summaries.double().mean(dim=0)
    angles = [
        math.acos(float(y @ centre / (y.norm() * centre.norm()))) for y in summaries.double()
    ]  # eq. 3-7, one image at a time
    assert dispersion().item() == pytest.approx(sum(a * a for a in angles) / 500, rel=1e-6)
    tokens = torch.ones(500, 1, 2)
    student = Features(centre.float().expand(500, -1), tokens, (1, 1))
    losses = teacher_losses(student, Features(summaries, tokens, (1, 1)), ANGLE, None, dispersion)
    assert losses.summary.mean().item() == pytest.approx(1, rel=1e-5)


def test_a_running_dispersion_knows_the_steps_before() -> None:
    """Each step's angles are to the mean direction up to it; the loss has those of the steps before."""
    config, dispersion = replace(ANGLE, dispersion="running"), Dispersion(5)
    steps = [draw(4, 5, seed=seed) + 1 for seed in range(3)]
    total, squares = torch.zeros(5, dtype=torch.float64), []
    for number, summaries in enumerate(steps):
        known = sum(squares) / len(squares) if squares else 1.0
        features = Features(summaries, torch.ones(4, 1, 2), (1, 1))
        turned = features._replace(summary=summaries.roll(1, dims=1))
        found = teacher_losses(turned, features, config, None, dispersion).summary
        torch.testing.assert_close(found, angle(turned.summary, summaries).square() / known), number
        dispersion.update(alone)
        total += summaries.double().mean(dim=0)
        squares.append(float(angle(summaries.double(), total).square().mean()))
    dispersion.see(torch.full((4, 5), math.nan))
    dispersion.update(alone)
    assert dispersion().item() == pytest.approx(sum(squares) / 3, rel=1e-6)  # without what is not finite


def test_a_running_dispersion_of_one_image_a_step() -> None:
    """The first has no angle to itself: 1 until a second is there, whose angle is to the mean of both."""
    dispersion = Dispersion(2)
    for image, square in (((1.0, 0.0), 1.0), ((0.0, 1.0), (math.pi / 4) ** 2)):
        dispersion.see(torch.tensor([image]))
        dispersion.update(alone)
        assert dispersion().item() == pytest.approx(square)


@pytest.mark.parametrize("kind", ["pca", "phi-s"])
def test_what_was_measured_on_too_little_is_said(kind: Normalisation) -> None:
    group = TeacherGroup(teachers=("a",), adaptors=("a",), sides=(48,), batch_size=3, first=0, ranks=(0,))
    for num_images, few in ((3, kind == "pca"), (300, False)):
        statistics = TargetStatistics({"a": (5, 8)}, ["a"], kind)
        features = Features(draw(num_images, 5), draw(num_images, 4, 8), (2, 2))
        statistics.add(Batch((GroupBatch(group, torch.zeros(num_images, 3, 8, 8), {"a": features}),), 0.0))
        (line,) = statistics.fit(alone)
        assert ("of only 12 tokens of 8 channels, which pca fits too closely" in line) == few
    single = replace(group, batch_size=1)
    statistics = TargetStatistics({"a": (5, 8)}, dispersion="fixed")
    features = Features(draw(1, 5), draw(1, 4, 8), (2, 2))
    statistics.add(Batch((GroupBatch(single, torch.zeros(1, 3, 8, 8), {"a": features}),), 0.0))
    with pytest.raises(RadioError, match=r"one image was measured, .* give a larger --normalise.steps"):
        statistics.fit(alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.03, 5.5])
def test_predicting_zero_costs_one_for_every_teacher(kind: Normalisation, scale: float) -> None:
    teacher = scale * (draw(50, 16, 8) @ draw(8, 8, seed=1) + 2)
    losses = normalised_losses(torch.zeros(50, 16, 8), teacher, fitted(teacher, kind))
    assert losses.shape == (50,) and losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(1, rel=2e-3)


def test_phi_s_is_a_scaled_squared_error_in_the_teachers_space() -> None:
    """The other published variant maps the student's tokens too: then only the scale is left."""
    teacher, student = 3 * draw(4, 9, 12) + 1, draw(4, 9, 12, seed=1)
    normaliser = fitted(teacher)
    alpha = torch.linalg.svdvals(normaliser.tx)[0]
    wanted = alpha**2 * (student - teacher).square().mean(dim=(1, 2))
    found = normalised_losses(normaliser(student), teacher, normaliser)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unexplained(student, teacher), wanted.mean(), rtol=1e-4, atol=1e-5)


def test_bfloat16_predictions_meet_targets_in_float32() -> None:
    teacher = draw(4, 9, 12)
    normaliser, student = fitted(teacher), draw(4, 9, 12, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = normalised_losses(student, teacher, normaliser)
    assert torch.equal(found, normalised_losses(student.float(), teacher, normaliser))


def test_only_a_fixed_number_of_images_gives_the_dispersion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.normalise._SUMMARIES", 10)
    statistics = TargetStatistics({"clip": (6, 3)}, ["clip"], "none", "fixed")
    group = TeacherGroup(
        teachers=("clip",), adaptors=("clip",), sides=(8,), batch_size=8, first=0, ranks=(0, 1)
    )
    steps = [draw(4, 6, seed=seed) + 1 for seed in range(4)]
    for summaries in steps:
        target = Features(summaries, torch.ones(4, 1, 3), (1, 1))
        statistics.add(Batch((GroupBatch(group, torch.zeros(4, 3, 8, 8), {"clip": target}),), 0.0))
    statistics.fit(alone)
    wanted = Dispersion(6)
    wanted.add(torch.cat(steps[:2]), alone)  # 16 images on two ranks
    assert torch.equal(statistics.of("clip", "clip")[1](), wanted())  # type: ignore[misc]


@pytest.mark.parametrize(
    ("width", "kind", "said"), [(6, "phi-s", True), (6, "pca", False), (4, "phi-s", False)]
)
def test_a_width_without_a_hadamard_matrix_is_reported(width: int, kind: Normalisation, said: bool) -> None:
    statistics = TargetStatistics({"clip": (2, width)}, ["clip"], kind)
    group = TeacherGroup(
        teachers=("clip",), adaptors=("clip",), sides=(8,), batch_size=2, first=0, ranks=(0,)
    )
    target = Features(torch.ones(2, 2), draw(2, 9, width), (3, 3))
    statistics.add(Batch((GroupBatch(group, torch.zeros(2, 3, 8, 8), {"clip": target}),), 0.0))
    (line,) = statistics.fit(alone)
    assert line.endswith(f"no Hadamard matrix of {width} is known: a random orthogonal one") == said


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_teachers_without_variance_are_refused(value: float) -> None:
    statistics = TargetStatistics({"clip": (6, 3)}, ["clip"], "phi-s")
    group = TeacherGroup(
        teachers=("clip",), adaptors=("clip",), sides=(8,), batch_size=2, first=0, ranks=(0,)
    )
    target = Features(torch.ones(2, 6), torch.full((2, 4, 3), value), (2, 2))
    statistics.add(Batch((GroupBatch(group, torch.zeros(2, 3, 8, 8), {"clip": target}),), 0.0))
    with pytest.raises(RadioError, match=r"teacher clip: the deviation of its tokens is (0\.0|nan)"):
        statistics.fit(alone)


@pytest.mark.parametrize(("value", "state"), [(1.0, "all the same"), (math.nan, "not finite")])
def test_summaries_without_a_dispersion_are_refused(value: float, state: str) -> None:
    """A single one that is not finite would leave nothing of the measurement, and the scale at 1."""
    statistics = TargetStatistics({"clip": (6, 3)}, ["clip"], "none", "fixed")
    group = TeacherGroup(
        teachers=("clip",), adaptors=("clip",), sides=(8,), batch_size=100, first=0, ranks=(0,)
    )
    summaries = torch.ones(100, 6) if value == 1 else draw(100, 6)
    summaries[7] = value
    target = Features(summaries, torch.ones(100, 1, 3), (1, 1))
    statistics.add(Batch((GroupBatch(group, torch.zeros(100, 3, 8, 8), {"clip": target}),), 0.0))
    with pytest.raises(RadioError, match=f"teacher clip: its summaries are {state}, and the angles"):
        statistics.fit(alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": LossConfig(cosine=0.5), "normalise": NormaliseConfig(kind="pca")}, "--loss.cosine is for"),
        (
            {"loss": LossConfig(smooth_l1_beta=0.5), "normalise": NormaliseConfig(kind="pca")},
            "--loss.smooth-l1-beta is for eq. 3",
        ),
        ({"loss": LossConfig(dispersion="running")}, "--loss.dispersion is for --loss.summary angle"),
        ({"loss": LossConfig(smooth_l1=0.0, smooth_l1_beta=2.0)}, "--loss.smooth-l1-beta is for smooth L1"),
        ({"normalise": NormaliseConfig(steps=7)}, "no loss of this run needs it"),
        (
            {
                "loss": LossConfig(summary="angle", dispersion="running"),
                "normalise": NormaliseConfig(steps=7),
            },
            "no loss of this run needs it",
        ),
        ({"normalise": NormaliseConfig(kind="phi-s", steps=0)}, "--normalise.steps"),
    ],
)
def test_settings_without_effect_are_errors(
    config: TrainConfig, start: Start, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(config, **changes)


@pytest.mark.parametrize(
    ("changes", "weight", "message"),
    [
        ({"normalise": NormaliseConfig(kind="phi-s")}, "spatial_weight", "--normalise.kind phi-s is for the"),
        ({"loss": ANGLE}, "summary_weight", "--loss.summary angle is for the summaries' losses"),
        ({"loss": LossConfig(summary="mse")}, "summary_weight", "--loss.summary mse is for the summaries'"),
    ],
)
def test_losses_without_a_weight_in_any_stage_are_errors(
    config: TrainConfig, changes: dict[str, Any], weight: str, message: str
) -> None:
    none = tuple(replace(teacher, **{weight: 0.0}) for teacher in TEACHERS[:2])  # type: ignore[arg-type]
    chosen = replace(config, teachers=none, **changes)
    with pytest.raises(ConfigError, match=message):
        check_stages(chosen, 1)
    with pytest.raises(ConfigError, match=message):
        plan({"run": chosen}, PlanOptions(), Console(quiet=True))
    check_stages(replace(chosen, stages=(StageConfig(steps=2, teachers=TEACHERS[:2]),)), 1)
    check_loss_weights(replace(config, teachers=none))  # the defaults


def normalised(config: TrainConfig, kind: Normalisation = "phi-s", **changes: object) -> TrainConfig:
    chosen = replace(config, normalise=NormaliseConfig(kind=kind, steps=3), loss=ANGLE)
    return replace(chosen, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["phi-s", "pca"])
def test_checkpoints_speak_the_teachers_own_spaces(
    config: TrainConfig, start: Start, kind: Normalisation
) -> None:
    run = start(normalised(config, kind, steps=4, ema=0.5))
    path = run.train()
    images = resize_images(draw(2, 3, 8, 8).sigmoid(), (48, 48))
    averaged = {**run.model.state_dict(), **run.average.tensors}  # type: ignore[union-attr]
    for file, weights in (("ckpt.pt", run.model.state_dict()), ("ckpt-ema.pt", averaged)):
        run.model.load_state_dict(weights)
        stored = load(path.with_name(file))
        with torch.no_grad():
            features = run.model.eval()(images)
            for teacher in TEACHERS:
                normaliser, _ = run.loss.statistics.of(teacher.name, teacher.name)
                assert normaliser is not None
                raw = run.model.adapt(teacher.name, features, (5, 5))
                found = stored.adapt(teacher.name, stored(images), (5, 5))
                torch.testing.assert_close(found.tokens, normaliser.invert(raw.tokens), atol=1e-5, rtol=1e-5)
                assert torch.equal(found.summary, raw.summary)


def test_the_normalisation_is_that_of_the_first_steps(config: TrainConfig, start: Start) -> None:
    """Measured on the very images of the first three steps, which are trained on afterwards."""
    run = start(normalised(config, steps=3))
    before = list(run.batches())
    again = start(normalised(config, steps=3), out=config.out / "again")
    again.train()
    for name in ("clip", "dense", "sam"):
        targets = [batch.groups[0].targets[name] for batch in before]
        wanted = fitted(torch.cat([target.tokens for target in targets]))
        dispersion = Dispersion(targets[0].summary.shape[1])
        dispersion.add(torch.cat([target.summary for target in targets]), alone)
        found = again.loss.statistics.of(name, name)
        assert found[0] is not None and found[1] is not None
        torch.testing.assert_close(found[0].tx, wanted.tx, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1](), dispersion())


def test_a_teacher_cache_is_measured_too(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    cache = CacheConfig(folder=tmp_path / "cache", confirm=False)
    run = start(normalised(config, steps=3, cache=cache))
    run.train()
    assert all(math.isfinite(loss) for loss in losses_of(config.out))
    normaliser, _ = run.loss.statistics.of("clip", "clip")
    assert normaliser is not None and float(normaliser.tx.norm()) != pytest.approx(24**0.5)


@pytest.mark.parametrize("dispersion", ["fixed", "running"])
def test_a_resumed_run_ends_like_an_undisturbed_one(
    config: TrainConfig, start: Start, dispersion: str
) -> None:
    chosen = normalised(config, loss=replace(ANGLE, dispersion=dispersion), steps=8, save_every=3)  # type: ignore[arg-type]
    start(chosen, out=config.out / "whole").train()
    stop_at(5, start(chosen, out=config.out / "stopped"))
    resumed = start(chosen, out=config.out / "stopped")
    assert resumed.step == 3
    resumed.train()
    assert untimed(config.out / "stopped") == untimed(config.out / "whole")
    assert same_weights(config.out / "stopped", config.out / "whole")


@pytest.mark.parametrize(
    ("dispersion", "changes"),
    [
        ("fixed", {"ranks_per_group": (1, 1)}),  # each rank has its own teachers
        ("fixed", {"teacher_placement": "shared"}),
        ("running", {"teacher_placement": "shared", "parallel": "fsdp"}),
    ],
)
def test_ranks_measure_what_one_process_does_and_one_goes_on(
    config: TrainConfig, start: Start, tmp_path: Path, dispersion: str, changes: dict[str, object]
) -> None:
    apart = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=72, batch_size=2))
    loss = replace(ANGLE, dispersion=dispersion)  # type: ignore[arg-type]
    chosen = normalised(config, loss=loss, teachers=apart, steps=6, save_every=3)
    stop_at(4, start(chosen, out=tmp_path / "whole"))
    ranks = replace(chosen, out=tmp_path / "ranks", **changes)  # type: ignore[arg-type]

    def work(group: Ranks) -> dict[str, Tensor]:
        run = Trainer(ranks, group, CPU, Console(quiet=True))
        stop_at(4, run)
        return run.loss.statistics.state_dict()

    one, other = on_ranks(2, tmp_path / "meeting", work)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())
    folded = [checkpoint.load(tmp_path / name / "ckpt.pt").tensors for name in ("whole", "ranks")]
    assert folded[0].keys() == folded[1].keys()
    for name, tensor in folded[0].items():  # rounding decides steps of AdamW where gradients are zero
        assert float((folded[1][name] - tensor).abs().max()) < 5e-3, name
    ends = []
    for name in ("whole", "ranks"):
        resumed = start(chosen, out=tmp_path / name)
        assert resumed.step == 3
        resumed.train()
        ends.append(resumed.loss.statistics.state_dict())
    assert len(ends[0]) == 3 * 5
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    if dispersion == "fixed":  # what the ranks measured is in their state, to the last bit
        assert all(torch.equal(ends[1][key], tensor) for key, tensor in one.items())
    pairs = zip(read_records(tmp_path / "whole"), read_records(tmp_path / "ranks"), strict=True)
    for record, from_ranks in pairs:
        for key in ("loss", "clip/summary", "sam/spatial"):
            assert from_ranks[key] == pytest.approx(record[key], rel=1e-5), key


class Scaled(nn.Module):
    """A trunk whose features are so many times larger."""

    def __init__(self, trunk: nn.Module, scale: float) -> None:
        super().__init__()
        self.trunk, self.scale = trunk, scale

    def forward(self, images: Tensor) -> Features:
        features: Features = self.trunk(images)
        return Features(features.summary * self.scale, features.tokens * self.scale, features.grid)


@pytest.mark.slow
def test_teachers_of_all_scales_are_learned_alike(tmp_path: Path) -> None:
    """SAM's features deviate by 5.5, CLIP's by 0.03: eq. 3 learns only one, normalised losses both."""
    kept = tuple(t for t in smoke().teachers if t.name != "dense")
    base = replace(
        smoke(), teachers=kept, steps=12, log_every=1, device="cpu", data=replace(smoke().data, workers=0)
    )

    def learn(name: str, scales: dict[str, float], **changes: object) -> dict[str, float]:
        teachers = {}
        for teacher in kept:
            teachers[teacher.name] = load_teacher(teacher.model)
            trunk = teachers[teacher.name].trunk  # type: ignore[attr-defined]
            teachers[teacher.name].trunk = Scaled(trunk, scales[teacher.name])  # type: ignore[attr-defined]
        config = replace(base, out=tmp_path / name, **changes)  # type: ignore[arg-type]
        Trainer(config, Ranks(), CPU, Console(quiet=True), teachers=teachers).train()
        return read_records(config.out)[-1]

    apart, same = {"clip": 0.03, "sam": 5.5}, {"clip": 1.0, "sam": 1.0}
    phi_s = {"normalise": NormaliseConfig(kind="phi-s", steps=12)}
    plain, scaled, unscaled = (
        learn("plain", apart),
        learn("scaled", apart, **phi_s),
        learn("same", same, **phi_s),
    )
    assert plain["clip/unexplained"] > 20  # though its cosine is learned
    for name in ("clip", "sam"):
        assert scaled[f"{name}/unexplained"] < 1.2
        assert scaled[f"{name}/unexplained"] == pytest.approx(unscaled[f"{name}/unexplained"], rel=0.02)
