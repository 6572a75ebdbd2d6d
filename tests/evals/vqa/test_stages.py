"""A stage's training: against a plain loop, with any accumulation, killed and taken up again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from evals.vqa import stages
from evals.vqa.conversations import Record
from evals.vqa.language import Tiny
from evals.vqa.llava import PROJECTOR, learn, make_llava
from evals.vqa.order import order
from evals.vqa.presets import StagePlan
from evals.vqa.samples import Batch, Conversations
from evals.vqa.stages import Job, factor, final_loss, train
from evals.vqa.states import read_state
from radio.dist import Group
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.progress import no_progress

ALL = (PROJECTOR, "model.language_model.", "lm_head.")
PLAN = StagePlan(
    template="v1",
    view="pad",
    learns=("projector", "language"),
    lr=1e-2,
    weight_decay=0.0,
    batch=4,
    micro_batch=4,
    steps=6,
    warmup=2,
    save_every=2,
)


@pytest.fixture
def make_job(tiny: Tiny, records: list[Record], shown: Any, tmp_path: Path) -> Callable[..., Job]:
    def make(name: str = "state", key: str = "key", plan: StagePlan = PLAN, chosen: Any = None) -> Job:
        return Job(
            title="instruct",
            plan=plan,
            data=Conversations(records if chosen is None else chosen, plan.template, tiny, shown, 99),
            pad_token=tiny.pad_token,
            seed=5,
            state=tmp_path / f"{name}.pt",
            key=key,
            device=torch.device("cpu"),
            bf16=False,
            shard=False,
            workers=0,
            group=Group(),
        )

    return make


@pytest.fixture
def make_model(backbone: Callable[..., Any], tiny: Tiny) -> Callable[..., Any]:
    def make(learns: tuple[str, ...] = ALL) -> Any:
        model = make_llava(backbone(), tiny, (32, 32), 4, layer_norm=False, seed=0)
        learn(model, learns)
        return model

    return make


def by_hand(model: Any, job: Job) -> list[float]:
    """A plain loop over the same batches: AdamW, clipped gradients, warm-up and cosine."""
    data, plan = job.data, job.plan
    places = list(order(data.lengths(), data.modalities(), plan.batch, plan.steps, job.seed))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=plan.lr, weight_decay=0.0)
    losses = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * factor(step, plan.steps, plan.warmup)
        batch = Batch(job.pad_token)([data[p] for p in places[step * plan.batch : (step + 1) * plan.batch]])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_is_the_plain_loop(make_job: Callable[..., Job], make_model: Callable[..., Any]) -> None:
    expected = by_hand(make_model(), make_job())
    before = (torch.random.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
    state = train(make_model(), make_job(), no_progress)
    assert torch.equal(torch.random.get_rng_state(), before[0])  # nothing is seeded globally
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]  # noqa: NPY002
    assert state.losses == pytest.approx(expected, abs=2e-4)
    assert expected[-1] < expected[0]
    assert (state.step, state.optimizer) == (6, {})


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_does_not_change_the_training(
    make_job: Callable[..., Job], make_model: Callable[..., Any], micro_batch: int
) -> None:
    """Answers are of different lengths: the mean is over all tokens of a batch, not over its parts."""
    whole = train(make_model(), make_job("whole"), no_progress)
    parts = train(make_model(), make_job("parts", plan=replace(PLAN, micro_batch=micro_batch)), no_progress)
    assert parts.losses == pytest.approx(whole.losses, abs=2e-4)


class Kill:
    """A watch whose bar breaks off after so many steps."""

    def __init__(self, after: int) -> None:
        self.left, self.steps = after, 0

    def __call__(self, label: str, total: int) -> Kill:
        return self

    def __enter__(self) -> Callable[[int], None]:
        def advance(steps: int) -> None:
            if self.steps >= self.left:
                raise KeyboardInterrupt
            self.steps += steps

        return advance

    def __exit__(self, *_: object) -> None:
        return None


def test_a_killed_training_ends_like_an_undisturbed_one(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    whole = train(make_model(), make_job("whole"), no_progress)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), make_job("killed"), Kill(5))
    assert read_state(make_job("killed").state, "key").step == 4
    again = train(make_model(), make_job("killed"), no_progress)
    assert again.losses == whole.losses
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    model = make_model()
    watch = Kill(0)
    assert train(model, make_job("killed"), watch).losses == whole.losses  # found, not trained
    with pytest.raises(CheckpointError, match="is the training of another backbone, data set or protocol"):
        train(model, make_job("killed", key="other"), no_progress)


def test_only_what_learns_is_written_down(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    model = make_model((PROJECTOR,))
    frozen = model.lm_head.weight.detach().clone()
    state = train(model, make_job(plan=replace(PLAN, template="plain", steps=2)), no_progress)
    assert set(state.weights) == {
        f"{PROJECTOR}linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")
    }
    assert torch.equal(model.lm_head.weight, frozen)


def test_a_loss_that_is_not_finite_stops(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    with pytest.raises(RadioError, match=r"instruct: the loss of step \d is nan; lower the learning rate"):
        train(make_model(), make_job(plan=replace(PLAN, lr=math.inf)), no_progress)


def test_a_batch_that_ranks_cannot_share(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 does not divide into 1 ranks of 3"):
        train(make_model(), make_job(plan=replace(PLAN, micro_batch=3)), no_progress)


def test_the_schedule_by_hand() -> None:
    assert [factor(step, 6, 2) for step in range(7)] == pytest.approx(
        [0, 0.5, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0]
    )
    assert factor(0, 4, 0) == 1
    assert final_loss([9.0] * 90 + [1.0] * 10) == 1
    assert final_loss([3.0, 1.0]) == 2


def test_computing_activations_again_changes_nothing(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    plain = train(make_model(), make_job("plain"), no_progress)
    again = train(make_model(), replace(make_job("again"), is_checkpointed=True), no_progress)
    assert again.losses == plain.losses
    for name, tensor in plain.weights.items():
        assert torch.equal(again.weights[name], tensor), name


def test_weights_that_are_not_finite_are_never_written(
    make_job: Callable[..., Job], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = stages.Keeper._learned

    def poisoned(self: Any, weights: Any) -> dict[str, torch.Tensor]:
        found = learned(self, weights)
        if len(self._losses) > 2:  # the step's loss was still finite
            found[f"{PROJECTOR}linear_2.bias"] = torch.full((32,), float("inf"))
        return found

    monkeypatch.setattr(stages.Keeper, "_learned", poisoned)
    with pytest.raises(
        RadioError, match=r"instruct: model\..*linear_2\.bias is not finite after step 4, which"
    ):
        train(make_model(), make_job(), no_progress)
    assert read_state(make_job().state, "key").step == 2  # what stood before stands


def test_a_seed_may_be_larger_than_numpys(
    make_job: Callable[..., Job], make_model: Callable[..., Any]
) -> None:
    job = replace(make_job(), seed=2**53 + 1)
    assert all(math.isfinite(loss) for loss in train(make_model(), job, no_progress).losses)
