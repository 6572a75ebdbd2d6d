"""Every balancer against its formula worked out by hand, its gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor

from radio.errors import ConfigError
from radio.types import Features
from train.config import BalanceConfig, TeacherConfig, TrainConfig
from train.losses import (
    AdaLoss,
    Amtml,
    Balancer,
    Naive,
    TeacherLosses,
    Uncertainty,
    check_balance,
    make_balancer,
)

CLIP = TeacherConfig(name="clip", model="tiny:clip", summary_weight=0.5, spatial_weight=2.0)
DENSE = TeacherConfig(name="dense", model="tiny:dense")
SAM = TeacherConfig(name="sam", model="tiny:sam", summary_weight=0.0)
TEACHERS = (CLIP, DENSE, SAM)
DECLARED = {"clip": (0.5, 2.0), "dense": (1.0, 1.0), "sam": (0.0, 1.0)}
WIDTH, BATCH = 4, 6
KINDS = ("uncertainty", "adaloss", "amtml")


def config_of(kind: str, teachers: tuple[TeacherConfig, ...] = TEACHERS, **settings: float) -> TrainConfig:
    return TrainConfig(
        recipe="test",
        student="vit-tiny12",
        teachers=teachers,
        resolution=48,
        steps=1,
        batch_size=BATCH,
        out=Path("out"),
        balance=BalanceConfig(kind=kind, **settings),  # type: ignore[arg-type]
    )


def made(kind: str, seed: int | None = None, **settings: float) -> Balancer:
    """A balancer in double precision; with a seed its parameters are random instead of zero."""
    balance = config_of(kind, **settings).balance
    balancer = make_balancer(balance, TEACHERS, WIDTH).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in balancer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return balancer


def drawn(seed: int, batch: int = BATCH) -> tuple[Features, dict[str, TeacherLosses]]:
    """A student's features, and losses of three teachers, of so many images."""
    generator = torch.Generator().manual_seed(seed)
    summary = torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64)
    values = torch.rand(len(TEACHERS), 2, batch, generator=generator, dtype=torch.float64) + 0.1
    losses = {t.name: TeacherLosses(*pair) for t, pair in zip(TEACHERS, values, strict=True)}
    return Features(summary, torch.zeros(batch, 1, WIDTH), (1, 1)), losses


def part(
    features: Features, losses: Mapping[str, TeacherLosses], rows: slice
) -> tuple[Features, dict[str, TeacherLosses]]:
    """The same of some of the images."""
    some = {name: TeacherLosses(*(values[rows] for values in pair)) for name, pair in losses.items()}
    return Features(features.summary[rows], features.tokens[rows], (1, 1)), some


def score(features: Features, factor: Tensor, image: int) -> float:
    """An inner product over the root of the width."""
    pairs = zip(features.summary[image].tolist(), factor.tolist(), strict=True)
    return sum(a * b for a, b in pairs) / math.sqrt(WIDTH)


def test_naive_is_the_declared_sum() -> None:
    features, losses = drawn(0)
    total, weights = made("naive")(features, losses)
    wanted = sum(
        declared * float(values.mean())
        for name, pair in losses.items()
        for declared, values in zip(DECLARED[name], pair, strict=True)
    )
    assert total.item() == pytest.approx(wanted, rel=1e-12)
    assert weights == {}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_uncertainty_is_eq_6(scale: float) -> None:
    features, losses = drawn(1)
    balancer = made("uncertainty", seed=2, regularizer_scale=scale)
    assert isinstance(balancer, Uncertainty)
    total, weights = balancer(features, losses)
    wanted = 0.0
    for name, pair in losses.items():
        for place, kind in enumerate(("summary", "spatial")):
            found = []
            for image in range(BATCH):
                offset = balancer.offsets[name][place].item()
                b = score(features, balancer.slopes[name][place], image) + offset
                loss = float(pair[place][image])
                wanted += (
                    DECLARED[name][place] * (math.exp(-b) * loss + scale * math.log1p(math.exp(b))) / BATCH
                )
                found.append(math.exp(-b))
            shown = DECLARED[name][place] * sum(found) / BATCH
            assert weights[f"{name}/{kind}_weight"].item() == pytest.approx(shown, rel=1e-12)
    assert total.item() == pytest.approx(wanted, rel=1e-12)


def test_uncertainty_starts_at_the_declared_weights() -> None:
    features, losses = drawn(2)
    total, weights = made("uncertainty")(features, losses)
    assert {name: weight.item() for name, weight in weights.items()} == {
        f"{name}/{kind}_weight": pair[place]
        for name, pair in DECLARED.items()
        for place, kind in enumerate(("summary", "spatial"))
    }
    plain, _ = made("naive")(features, losses)
    assert total.item() == pytest.approx(plain.item() + math.log(2) * 5.5)  # the declared weights' sum


def test_uncertainty_learns_to_trust_what_is_small() -> None:
    """Where e^-b times the loss is sigmoid(b), eq. 6 is at its minimum: the smaller is worth more."""
    teacher = TeacherConfig(name="clip", model="tiny:clip")
    balancer = Uncertainty([teacher], 1, 1.0).double()
    flat = Features(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, 1), (1, 1))
    losses = {"clip": TeacherLosses(torch.tensor([0.1]).double(), torch.tensor([2.0]).double())}
    descent = torch.optim.SGD(balancer.parameters(), lr=0.5)
    for _ in range(500):
        descent.zero_grad()
        balancer(flat, losses)[0].backward()
        descent.step()
    b = balancer.offsets["clip"]
    assert torch.allclose(torch.exp(-b) * torch.tensor([0.1, 2.0]), torch.sigmoid(b), atol=1e-6)
    assert torch.exp(-b[0]) > 2 > 0.7 > torch.exp(-b[1])


def test_adaloss_is_eq_7() -> None:
    balancer = made("adaloss", momentum=0.9)
    assert isinstance(balancer, AdaLoss)
    history: dict[tuple[str, int], list[float]] = {}
    for step in range(4):
        features, losses = drawn(10 + step)
        total, weights = balancer(features, losses)
        wanted = 0.0
        for name, pair in losses.items():
            for place, kind in enumerate(("summary", "spatial")):
                past = history.setdefault((name, place), [])
                shares = [0.9 ** (len(past) - 1 - i) for i in range(len(past))]
                expected = (
                    sum(a * b for a, b in zip(shares, past, strict=True)) / sum(shares) if past else 1.0
                )
                weight = DECLARED[name][place] / expected
                assert weights[f"{name}/{kind}_weight"].item() == pytest.approx(weight, rel=1e-6)
                wanted += weight * float(pair[place].mean())
                past.append(float(pair[place].mean()))
        assert total.item() == pytest.approx(wanted, rel=1e-6)
        balancer.update(lambda sums: sums)


def test_adaloss_has_the_papers_momentum() -> None:
    balancer = made("adaloss")
    assert isinstance(balancer, AdaLoss)
    for value in (1.0, 3.0):
        two = torch.full((2,), value, dtype=torch.float64)
        balancer(drawn(0, 2)[0], {"dense": TeacherLosses(two, 2 * two)})
        balancer.update(lambda sums: sums)
    expected = (0.99 * 1.0 + 3.0) / 1.99
    assert balancer.means["dense"]().tolist() == pytest.approx([expected, 2 * expected])
    assert balancer.means["clip"]().tolist() == [1.0, 1.0]  # not seen


def test_adaloss_leaves_a_loss_out_that_is_not_finite() -> None:
    balancer = made("adaloss")
    assert isinstance(balancer, AdaLoss)
    features, losses = drawn(3)
    for poison in (1.0, math.nan, math.inf):
        balancer(features, {n: TeacherLosses(p.summary * poison, p.spatial) for n, p in losses.items()})
        balancer.update(lambda sums: sums)
    wanted = [float(values.mean()) for values in losses["clip"]]
    assert balancer.means["clip"]().tolist() == pytest.approx(wanted)


def test_adaloss_goes_on_exactly_from_its_state() -> None:
    one, other = made("adaloss"), made("adaloss")
    assert isinstance(one, AdaLoss) and isinstance(other, AdaLoss)
    for step in range(3):
        one(*drawn(step))
        one.update(lambda sums: sums)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*drawn(9))[0], other(*drawn(9))[0])
    assert len(one.state_dict()) == 2 * len(TEACHERS)


def test_amtml_is_a_softmax_over_the_teachers_of_each_image() -> None:
    features, losses = drawn(4)
    balancer = made("amtml", seed=5)
    assert isinstance(balancer, Amtml)
    total, weights = balancer(features, losses)
    wanted = 0.0
    for place, names in enumerate((("clip", "dense"), ("clip", "dense", "sam"))):  # SAM's lambda is 0
        shares: dict[str, list[float]] = {name: [] for name in names}
        for image in range(BATCH):
            raised = {n: math.exp(score(features, balancer.factors[n][place], image)) for n in names}
            for name in names:
                shares[name].append(raised[name] / sum(raised.values()))
                loss = float(losses[name][place][image])
                wanted += DECLARED[name][place] * shares[name][-1] * loss / BATCH
        for name in names:
            shown = DECLARED[name][place] * sum(shares[name]) / BATCH
            key = f"{name}/{('summary', 'spatial')[place]}_weight"
            assert weights[key].item() == pytest.approx(shown, rel=1e-12)
    assert total.item() == pytest.approx(wanted, rel=1e-12)
    assert "sam/summary_weight" not in weights


def test_amtml_starts_uniform() -> None:
    _, weights = made("amtml")(*drawn(5))
    assert weights["dense/summary_weight"].item() == pytest.approx(1 / 2)
    assert weights["dense/spatial_weight"].item() == pytest.approx(1 / 3)
    assert weights["clip/spatial_weight"].item() == pytest.approx(2 / 3)  # its declared 2 in


def test_amtml_collapses_onto_the_teacher_whose_loss_is_least() -> None:
    """The trivial way to make its sum small, which the paper saw."""
    balancer = made("amtml")
    features, losses = drawn(6)
    features = features._replace(summary=features.summary.abs())
    easy = {name: TeacherLosses(*(values + (name != "sam") for values in p)) for name, p in losses.items()}
    descent = torch.optim.AdamW(balancer.parameters(), lr=0.1)
    for _ in range(200):
        descent.zero_grad()
        balancer(features, easy)[0].backward()
        descent.step()
    assert balancer(features, easy)[1]["sam/spatial_weight"].item() > 0.98


@pytest.mark.parametrize("kind", ["naive", *KINDS])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    """In the student's summary, in every loss and in what is learned; AdaLoss's averages stand still."""
    features, losses = drawn(7)
    balancer = made(kind, seed=8)
    if isinstance(balancer, AdaLoss):
        balancer(features, losses)
        balancer.update(lambda sums: torch.cat((1.5 * sums[:, :-1], sums[:, -1:]), dim=1))
    names = list(losses)

    def total(summary: Tensor, values: Tensor, *parameters: Tensor) -> Tensor:
        given = {name: TeacherLosses(*pair) for name, pair in zip(names, values, strict=True)}
        held = dict(zip(dict(balancer.named_parameters()), parameters, strict=True))
        found = torch.func.functional_call(balancer, held, (features._replace(summary=summary), given))
        value: Tensor = found[0]
        return value

    values = torch.stack([torch.stack(list(pair)) for pair in losses.values()])
    inputs = [features.summary, values, *(p.detach() for p in balancer.parameters())]
    assert torch.autograd.gradcheck(total, [each.clone().requires_grad_() for each in inputs])


def gradients(balancer: Balancer, images: Iterable[slice], step: int) -> tuple[Tensor, ...]:
    """Of the mean over parts of one step's images: in every loss [3, 2, B] and in what is learned."""
    features, losses = drawn(step)
    values = torch.stack([torch.stack(list(pair)) for pair in losses.values()]).requires_grad_()
    leaves = (values, *balancer.parameters())
    given = {name: TeacherLosses(*pair) for name, pair in zip(losses, values, strict=True)}
    total = torch.zeros((), dtype=torch.float64)
    for rows in images:
        share = len(range(BATCH)[rows]) / BATCH
        total = total + share * balancer(*part(features, given, rows))[0]
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("kind", ["naive", *KINDS])
def test_passes_and_ranks_add_up_to_the_whole_step(kind: str) -> None:
    """The same gradients and averages, step after step, however the images are shared."""
    halves = [slice(0, 3), slice(3, 6)]
    whole, passes, *ranks = (made(kind, seed=10) for _ in range(4))
    for step in range(3):
        wanted = gradients(whole, [slice(None)], step)
        in_turn = gradients(passes, halves, step)
        shared = [gradients(rank, [half], step) for rank, half in zip(ranks, halves, strict=True)]
        for place, gradient in enumerate(wanted):
            assert torch.allclose(in_turn[place], gradient, rtol=1e-12)
            assert torch.allclose(shared[0][place] + shared[1][place], gradient, rtol=1e-12)
        update([whole])
        update([passes])
        update(ranks)
        for other in (passes, *ranks):
            assert all(
                torch.allclose(a, b, rtol=1e-12)
                for a, b in zip(other.buffers(), whole.buffers(), strict=True)
            )


def update(ranks: Sequence[Balancer]) -> None:
    """End the step of AdaLoss on ranks that tell one another what they have seen."""
    sent: list[Tensor] = []
    all_here = Barrier(len(ranks))

    def mean(seen: Tensor) -> Tensor:
        sent.append(seen)
        all_here.wait(timeout=10)
        return torch.stack(sent).mean(0)

    with ThreadPoolExecutor(len(ranks)) as pool:
        for ended in [pool.submit(rank.update, mean) for rank in ranks if isinstance(rank, AdaLoss)]:
            ended.result()


@pytest.mark.parametrize("kind", ["naive", *KINDS])
def test_a_term_without_weight_is_left_out_and_its_gradient_is_zero(kind: str) -> None:
    features, losses = drawn(11)
    leaf = losses["sam"].summary.clone().requires_grad_()
    given = {**losses, "sam": TeacherLosses(leaf, losses["sam"].spatial)}
    balancer = made(kind, seed=12)
    total = balancer(features, given)[0]
    total.backward()
    assert leaf.grad is not None and bool((leaf.grad == 0).all())
    larger = {**losses, "sam": TeacherLosses(losses["sam"].summary + 5, losses["sam"].spatial)}
    assert balancer(features, larger)[0].item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["naive", *KINDS])
def test_half_precision_features_are_weighed_in_float32(kind: str) -> None:
    features, losses = drawn(13)
    low = features._replace(summary=features.summary.bfloat16())
    single = {name: TeacherLosses(*(values.float() for values in pair)) for name, pair in losses.items()}
    balancer = made(kind, seed=14).float()
    with torch.autocast("cpu", torch.bfloat16):
        given = balancer(low, single)
    wanted = balancer(low._replace(summary=low.summary.float()), single)
    assert given[0].dtype == torch.float32
    assert torch.equal(given[0], wanted[0])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("naive", Naive), ("uncertainty", Uncertainty), ("adaloss", AdaLoss), ("amtml", Amtml)],
)
def test_the_setting_names_the_balancer(kind: str, wanted: type[Balancer]) -> None:
    config = config_of(kind)
    check_balance(config)
    balancer = make_balancer(config.balance, config.teachers, WIDTH)
    assert type(balancer) is wanted
    assert all(bool((parameter == 0).all()) for parameter in balancer.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("adaloss", momentum=1.0), r"--balance\.momentum 1\.0 cannot be; give 0 or more"),
        (config_of("adaloss", momentum=-0.1), r"--balance\.momentum -0\.1 cannot be"),
        (config_of("uncertainty", regularizer_scale=0.0), r"--balance\.regularizer-scale 0\.0 cannot be"),
        (
            config_of("naive", momentum=0.9),
            r"momentum is for --balance\.kind adaloss, and this run has naive",
        ),
        (
            config_of("amtml", regularizer_scale=2.0),
            r"--balance\.regularizer-scale is for --balance\.kind uncertainty, and this run has amtml",
        ),
        (config_of("amtml", (CLIP,)), "amtml weighs teachers against one another; give two or more"),
        (
            config_of("amtml", (CLIP, DENSE, replace(SAM, student_resolution=72))),
            r"clip\+dense and sam see other images or sizes; give all teachers one batch size",
        ),
        (config_of("amtml", (CLIP, replace(DENSE, batch_size=2))), "clip and dense see other images"),
    ],
)
def test_a_balancer_that_cannot_be(config: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_balance(config)
