"""A stage's training: against a plain loop, with any accumulation, killed and continued; its memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from evals.core.evaluator import EvalRun, RunSettings
from evals.vqa.data import Conversations, Record, collate, sample_order
from evals.vqa.language import LanguageModel
from evals.vqa.llava import PROJECTOR, make_llava
from evals.vqa.settings import StagePlan, VqaSettings
from evals.vqa.stage_trainer import (
    Needs,
    StageJob,
    StageTrainer,
    factor,
    plan_memory,
    projector_in_every_batch,
    round_frozen,
    train,
)
from radio.errors import ConfigError, RadioError
from radio.progress import ProgressFactory, no_progress

from .conftest import PLAN


@pytest.fixture
def make_job(
    tiny: LanguageModel, records: list[Record], shown: Any, tmp_path: Path
) -> Callable[..., StageJob]:
    def make(
        name: str = "stage",
        plan: StagePlan = PLAN,
        progress: ProgressFactory = no_progress,
        needs: Needs = Needs(),  # noqa: B008 (frozen)
        **shared: Any,
    ) -> StageJob:
        return StageJob(
            title="instruct",
            plan=plan,
            data=Conversations(records, plan.template, tiny.tokenizer, shown, 99),
            pad_token=tiny.pad_token,
            seed=5,
            folder=tmp_path / name,
            needs=needs,
            run=EvalRun(RunSettings(**shared), base="", folder=tmp_path, progress=progress),
        )

    return make


def by_hand(model: Any, job: StageJob) -> list[float]:
    """A plain loop over the same batches: AdamW, clipped gradients, warm-up and cosine."""
    data, plan = job.data, job.plan
    order = sample_order(data.lengths(), data.modalities(), plan.batch, plan.steps, job.seed)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=plan.lr, weight_decay=0.0)
    losses = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * factor(step, plan.steps, plan.warmup)
        chosen = order[step * plan.batch : (step + 1) * plan.batch]
        batch = collate([data[index] for index in chosen], job.pad_token)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_is_the_plain_loop(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    expected = by_hand(make_model(), make_job())
    before = (torch.random.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
    losses = train(make_model(), make_job()).losses
    assert torch.equal(torch.random.get_rng_state(), before[0])  # nothing is seeded globally
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]  # noqa: NPY002
    assert losses == pytest.approx(expected, abs=2e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_does_not_change_the_training(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any], micro_batch: int
) -> None:
    """Answers are of different lengths: the mean is over all tokens of a batch, not over its parts."""
    whole = train(make_model(), make_job("whole"))
    parts = train(make_model(), make_job("parts", plan=replace(PLAN, micro_batch=micro_batch)))
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


def checkpoints(tmp_path: Path, name: str) -> list[str]:
    return sorted(path.name for path in (tmp_path / name).glob("*/*"))


def test_a_killed_training_ends_like_an_undisturbed_one(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = train(make_model(), make_job("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), make_job("killed", progress=Kill(5)))
    assert checkpoints(tmp_path, "killed") == ["checkpoint-4"]
    watch = Kill(99)
    again = train(make_model(), make_job("killed", progress=watch))
    assert watch.steps == 6  # four of them before
    assert again.losses == whole.losses
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_checkpoint_that_is_not_whole_is_deleted(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """A run killed while it wrote has no signature, and nothing to tell; damage is told."""
    whole = train(make_model(), make_job("whole"))
    for number, (how, told) in enumerate(
        [("unsigned", 0), ("cut", 1), ("other", 1), ("absent", 1), ("folder", 0), ("both", 0)]
    ):
        name = f"killed{number}"
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), make_job(name, progress=Kill(5)))
        (folder,) = (tmp_path / name).glob("*/checkpoint-4")
        optimizer, signature = folder / "optimizer.pt", folder / "signature"
        if how == "unsigned":
            signature.unlink()
        elif how == "cut":
            optimizer.write_bytes(optimizer.read_bytes()[:-9])
        elif how == "other":
            signature.write_bytes(b"\xff")
        elif how == "absent":
            optimizer.unlink()
        elif how == "folder":
            signature.unlink()
            signature.mkdir()
        else:  # a later one was being written
            (folder.parent / "checkpoint-5").mkdir()
            (folder.parent / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
        watch = Kill(99)
        job = make_job(name, progress=watch)
        again = train(make_model(), job)
        assert again.losses == whole.losses and watch.steps == 6
        assert all(torch.equal(again.weights[weight], whole.weights[weight]) for weight in whole.weights)
        assert len(job.run.damage.notes()) == told, how


def test_a_full_disk_is_one_line(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        RadioError, match=r"checkpoint-2: the state of the training cannot be written \(.*free"
    ):
        train(make_model(), make_job())


def test_only_what_learns_is_written_down(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    model = make_model((PROJECTOR,))
    frozen = model.lm_head.weight.detach().clone()
    state = train(model, make_job(plan=replace(PLAN, template="plain", steps=2)))
    assert set(state.weights) == {
        f"{PROJECTOR}linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")
    }
    assert torch.equal(model.lm_head.weight, frozen)


def test_a_loss_that_is_not_finite_stops(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    with pytest.raises(RadioError, match=r"instruct: the loss of step \d is nan; lower the learning rate"):
        train(make_model(), make_job(plan=replace(PLAN, lr=math.inf)))


def test_a_batch_that_ranks_cannot_share(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 does not divide into 1 ranks of 3"):
        train(make_model(), make_job(plan=replace(PLAN, micro_batch=3)))


def test_the_schedule_by_hand() -> None:
    assert [factor(step, 6, 2) for step in range(7)] == pytest.approx(
        [0, 0.5, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0]
    )
    assert factor(0, 4, 0) == 1


def test_computing_activations_again_changes_nothing(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    plain = train(make_model(), make_job("plain"))
    again = train(make_model(), make_job("again", needs=Needs(is_checkpointed=True)))
    assert again.losses == plain.losses
    for name, tensor in plain.weights.items():
        assert torch.equal(again.weights[name], tensor), name


def test_weights_that_are_not_finite_are_never_written(
    make_job: Callable[..., StageJob],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    check = StageTrainer.check_finite

    def poisoned(self: Any) -> None:
        if self.state.global_step > 2:  # the step's loss was still finite
            with torch.no_grad():
                self.model.model.multi_modal_projector.linear_2.bias.fill_(math.inf)
        check(self)

    monkeypatch.setattr(StageTrainer, "check_finite", poisoned)
    with pytest.raises(
        RadioError, match=r"instruct: model\..*linear_2\.bias is not finite after step 4, which"
    ):
        train(make_model(), make_job())
    assert checkpoints(tmp_path, "stage") == ["checkpoint-2"]  # what stood before stands


def test_the_model_is_left_as_it_was(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    """But for its weights: the next stage and the answers use it."""
    model = make_model()
    before, config = set(vars(model)), model.config.to_dict()
    job = make_job(needs=Needs(is_checkpointed=True), precision="bf16")
    train(model, job)
    assert set(vars(model)) - before <= {"_require_grads_hooks"} and model.config.to_dict() == config
    assert not model.training and not model.is_activation_checkpointing
    assert all(weight.grad is None for weight in model.parameters())


def test_a_seed_may_be_larger_than_numpys(
    make_job: Callable[..., StageJob], make_model: Callable[..., Any]
) -> None:
    job = replace(make_job(), seed=2**53 + 1)
    assert all(math.isfinite(loss) for loss in train(make_model(), job).losses)


CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def plan_for(
    model: nn.Module,
    settings: VqaSettings,
    device: torch.device,
    world: int,
    dtype: torch.dtype = torch.float32,
) -> Needs:
    run: Any = SimpleNamespace(device=device, dtype=dtype, ranks=SimpleNamespace(world=world))
    return plan_memory(model, settings, run)


def network(learning: int, frozen: int = 0) -> nn.Module:
    """Weights without memory."""
    model = nn.Module()
    model.learned = nn.Parameter(torch.empty(learning, device="meta"))
    model.frozen = nn.Parameter(torch.empty(frozen, device="meta"), requires_grad=False)
    return model


@pytest.fixture(autouse=True)
def large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB that nobody has."""
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_7b_model_is_sharded_on_gpus_and_its_activations_are_computed_again() -> None:
    needs = plan_for(network(6_740_000_000), VqaSettings(), GPU, 8)
    assert needs.is_sharded and needs.is_checkpointed
    assert needs.gigabytes == pytest.approx(16 * 6.74 / 8)
    assert needs.describe() == " (13 GB a rank before activations, sharded, activations recomputed)"


def test_what_no_gpu_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keeps 108 GB on every GPU .* has 80; shard it over more GPUs"):
        plan_for(network(6_740_000_000), VqaSettings(), GPU, 1)


def test_frozen_weights_of_large_models_are_halved_under_bf16() -> None:
    model = network(20_000_000, 6_740_000_000)
    needs = plan_for(model, VqaSettings(), GPU, 8, torch.bfloat16)
    assert needs.is_rounded and model.frozen.dtype == torch.float32
    round_frozen(model)
    assert (model.frozen.dtype, model.learned.dtype) == (torch.bfloat16, torch.float32)
    assert not needs.is_sharded and needs.gigabytes == pytest.approx(2 * 6.74 + 16 * 0.02)
    small = network(10, 1000)
    few = plan_for(small, VqaSettings(), GPU, 1, torch.bfloat16)
    assert few.describe() == "" and not few.is_rounded
    whole = network(10, 2_000_000_000)
    assert plan_for(whole, VqaSettings(), CPU, 1).gigabytes == pytest.approx(8.0)


def test_settings_decide() -> None:
    asked = plan_for(network(1000), VqaSettings(fsdp=True, activation_checkpointing=True), GPU, 2)
    assert (asked.is_sharded, asked.is_checkpointed) == (True, True)
    refused = plan_for(network(2_000_000_000), VqaSettings(activation_checkpointing=False), CPU, 2)
    assert (refused.is_sharded, refused.is_checkpointed) == (False, False)
    assert not plan_for(network(1000), VqaSettings(fsdp=True), CPU, 1).is_sharded
    with pytest.raises(ConfigError, match="--fsdp shards over GPUs, and the device is cpu; leave it out"):
        plan_for(network(1000), VqaSettings(fsdp=True), CPU, 2)


def test_the_projector_gets_a_gradient_of_zero(backbone: Callable[..., Any], tiny: LanguageModel) -> None:
    model = make_llava(backbone(), tiny, (32, 32), 4, layer_norm=False, seed=0)
    ids = torch.tensor([[1, 5, 6, 7]])
    weights = list(model.model.multi_modal_projector.parameters())
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    assert all(weight.grad is None for weight in weights)
    with projector_in_every_batch(model):
        loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, plain)
    loss.backward()
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in weights)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)  # the hook is gone
