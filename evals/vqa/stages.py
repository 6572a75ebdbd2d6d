"""A training stage: transformers' Trainer with our order of samples, schedule and resumption.

The Trainer provides the loop (gradient accumulation, clipping, mixed precision, DDP). Order, schedule and
saved states are ours: a resumed run trains on the same samples as an uninterrupted one.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from radio.dist import Group
from radio.errors import ConfigError, RadioError
from radio.progress import ProgressFactory, ProgressWithText
from radio.provenance import fast_products

from .library import fitting_threads
from .order import Order, order
from .parallel import projector_in_every_batch, shard
from .presets import StagePlan
from .samples import Batch, Conversations
from .states import StageState, read_state, write_state

LAST_SHARE = 10  # the final loss is the mean over the last tenth of the steps, at least ten


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The inputs of one stage's training."""

    title: str
    plan: StagePlan
    data: Conversations
    pad_token: int
    seed: int
    state: Path
    key: str  # a hash of everything that determines the outcome
    device: torch.device
    bf16: bool
    shard: bool  # FSDP2 instead of DDP
    is_checkpointed: bool = False  # activation checkpointing
    workers: int
    group: Group

    @property
    def lacks_images(self) -> bool:
        """Whether the projector is trained and some batches may have no image."""
        return "projector" in self.plan.learns and not all(self.data.modalities())


def train(model: Any, job: Job, watch: ProgressFactory) -> StageState:
    """Train `model`, resuming where an earlier run stopped; return the state at the end.

    Raises:
        ConfigError: a batch that cannot be divided among the ranks.
        RadioError: the loss is not finite.
        CheckpointError: the state of an earlier run is damaged or another run's.
    """
    start = read_state(job.state, job.key, job.group)
    if start.step >= job.plan.steps:
        return start
    with (
        tempfile.TemporaryDirectory(prefix="am-radio-vqa-") as folder,
        _own_randomness(job.device),
        fitting_threads(model, job.device),
        fast_products(job.device),
        projector_in_every_batch(model) if job.lacks_images else nullcontext(),
        watch(job.title, job.plan.steps) as advance,
    ):
        if start.step:
            advance(start.step)
        if job.shard:
            shard(model, job.device, job.group.world)
        StageTrainer(job, start, Keeper(job, start, advance), model, folder).train()
    job.group.barrier()
    return read_state(job.state, job.key, job.group)


def final_loss(losses: Sequence[float]) -> float:
    """Compute the mean loss over the last tenth of the steps, at least ten steps."""
    last = losses[-max(10, len(losses) // LAST_SHARE) :]
    return sum(last) / len(last)


@final
class StageTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with our order of samples and schedule."""

    def __init__(self, job: Job, start: StageState, keeper: Keeper, model: Any, folder: str) -> None:
        self._job, self._start = job, start
        super().__init__(
            model=model,
            args=_arguments(job, start, folder),
            data_collator=Batch(job.pad_token),
            train_dataset=job.data,
            callbacks=[keeper],
        )
        self.remove_callback(PrinterCallback)
        self.is_distributed_loading_by_transformers = job.shard  # FSDP2 handles placement and gradients
        keeper.trainer = self

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        plan, data = self._job.plan, self._job.data
        places = order(data.lengths(), data.modalities(), plan.batch, plan.steps, self._job.seed)
        return Order(list(islice(places, self._start.step * plan.batch, None)))

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Skip gradient reduction in all but a step's last micro-batch; the original needs an FSDP config."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Create linear warm-up and a cosine to zero over all steps, from the step that the run starts at."""
        plan, first = self._job.plan, self._start.step
        bare: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self.lr_scheduler = LambdaLR(bare, lambda step: factor(step + first, plan.steps, plan.warmup))
        return self.lr_scheduler


def factor(step: int, steps: int, warmup: int) -> float:
    """Compute the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@final
class Keeper(TrainerCallback):  # type: ignore[misc]
    """Restores the state of an earlier run, saves that of this one, and updates the progress bar."""

    trainer: StageTrainer

    def __init__(self, job: Job, start: StageState, advance: Any) -> None:
        self._job, self._start, self._advance = job, start, advance
        self._losses = list(start.losses)
        self._told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore weights and optimizer of the earlier run."""
        if self._start.step:
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_state_dict(
                self._model(),
                self._optimizer(),
                model_state_dict=dict(self._start.weights),
                optim_state_dict=self._start.optimizer,
                options=options,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record the step's loss (mean over its learned tokens and all ranks); save the state when due."""
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        step = self._start.step + state.global_step
        if not math.isfinite(loss):
            raise RadioError(
                f"{self._job.title}: the loss of step {step} is {loss}; lower the learning rate, or look "
                f"for values that are not finite in the encoder's tokens"
            )
        self._losses.append(loss)
        self._advance(1)
        if isinstance(self._advance, ProgressWithText) and time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            self._advance.set_postfix(f"loss {loss:.4f}")
        if step % self._job.plan.save_every == 0 or step == self._job.plan.steps:
            self._write(step)

    def _write(self, step: int) -> None:
        is_last = step == self._job.plan.steps
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights, optimizer = get_state_dict(self._model(), self._optimizer(), options=options)
        learned = self._learned(weights) if self._job.group.leads else {}
        self._check_finite(learned, step)
        if self._job.group.leads:
            kept = StageState(
                step=step,
                weights=learned,
                optimizer={} if is_last else optimizer,
                losses=tuple(self._losses),
            )
            write_state(self._job.state, self._job.key, kept)
        self._job.group.barrier()

    def _check_finite(self, learned: dict[str, Tensor], step: int) -> None:
        """Check on every rank that the weights are finite, before they overwrite those of an earlier step.

        Raises:
            RadioError: some are not; names the first.
        """
        wrong = [name for name, tensor in learned.items() if not bool(tensor.isfinite().all())]
        if int(self._job.group.gather(torch.tensor(len(wrong))).max()):
            raise RadioError(
                f"{self._job.title}: {wrong[0] if wrong else 'a weight'} is not finite after step {step}, "
                f"which is therefore not written down; lower the learning rate"
            )

    def _learned(self, weights: Any) -> dict[str, Tensor]:
        """Select the trainable weights; torch also returns a frozen weight that is tied to another name."""
        model: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {name: weights[name].contiguous() for name in names}

    def _model(self) -> nn.Module:
        module: nn.Module = self.trainer.model_wrapped
        return module

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.trainer.optimizer
        bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return bare


def _arguments(job: Job, start: StageState, folder: str) -> TrainingArguments:
    plan, world = job.plan, job.group.world
    share = plan.micro_batch * world
    if plan.batch % share:
        raise ConfigError(
            f"a batch of {plan.batch} does not divide into {world} ranks of {plan.micro_batch}; choose a "
            f"--micro-batch that does"
        )
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=plan.steps - start.step,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.batch // share,
        learning_rate=plan.lr,
        weight_decay=plan.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=job.bf16,
        activation_checkpointing=job.is_checkpointed,
        use_cpu=job.device.type == "cpu",
        ddp_backend="gloo" if world > 1 and job.device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=job.workers,
        dataloader_pin_memory=job.device.type == "cuda",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=job.seed % 2**32,  # the range of the NumPy seed that transformers sets
    )
    if arguments.n_gpu > 1:  # one process uses one GPU; torchrun starts one per GPU
        arguments._n_gpu = 1
    return arguments


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Restore global generators and logging after the Trainer has changed them."""
    state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (all three generators are seeded)
    level = transformers.logging.get_verbosity()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # default: all GPUs
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
        random.setstate(python_state)
        transformers.logging.set_verbosity(level)
