"""One training by transformers' Trainer: its memory, and checkpoints that are whole or ignored."""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments

from evals.core.evaluator import EvalRun
from radio.chunks import DamagedError
from radio.errors import ConfigError, RadioError
from radio.io import write_text
from radio.progress import ProgressWithText
from radio.resources import fast_products

from .data import Conversations, collate, sample_order
from .llava import limit_threads
from .settings import StagePlan, VqaSettings

_SIGNATURE = "signature"  # the file that makes a checkpoint whole
_LARGE = 1_000_000_000  # weights from which activations are recomputed, and frozen weights are bf16
_SHARDED = 3_000_000_000  # trainable weights that fit no GPU with gradients and Adam's two moments in fp32
_GB = 1e9


class Needs(NamedTuple):
    """How a stage is trained, and the memory that every rank needs for it."""

    is_sharded: bool = False
    is_checkpointed: bool = False
    is_rounded: bool = False  # frozen weights are bf16
    gigabytes: float = 0.0  # weights, gradients and Adam's moments, without activations

    @property
    def changes_model(self) -> bool:
        """Whether the model cannot be used after the stage."""
        return self.is_sharded or self.is_rounded

    def describe(self) -> str:
        """Return a note for the progress bar; empty below 1 GB."""
        if self.gigabytes < 1:
            return ""
        parts = [f"{self.gigabytes:.0f} GB a rank before activations"]
        parts += ["sharded"] * self.is_sharded + ["activations recomputed"] * self.is_checkpointed
        return f" ({', '.join(parts)})"


def plan_memory(model: Any, settings: VqaSettings, run: EvalRun) -> Needs:
    """Decide how a stage of the model is trained, and what memory that takes.

    Args:
        model: trainable parameters have `requires_grad`.
        settings: of the evaluation.
        run: its device, precision and ranks.

    Raises:
        ConfigError: sharding on a CPU; or weights, gradients and moments alone exceed the GPU's memory.
    """
    device, world = run.device, run.ranks.world
    if settings.fsdp and world > 1 and device.type != "cuda":
        raise ConfigError(f"--fsdp shards over GPUs, and the device is {device}; leave it out")
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    is_sharded = world > 1 and device.type == "cuda" and (settings.fsdp or learning >= _SHARDED)
    is_rounded = run.dtype == torch.bfloat16 and count >= _LARGE and not is_sharded
    held = 12 * learning + sum(
        parameter.numel() * (2 if is_rounded and not parameter.requires_grad else parameter.element_size())
        for parameter in parameters
    )
    checkpointing = settings.activation_checkpointing
    needs = Needs(
        is_sharded=is_sharded,
        is_checkpointed=count >= _LARGE if checkpointing is None else checkpointing,
        is_rounded=is_rounded,
        gigabytes=held / (world if is_sharded else 1) / _GB,
    )
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / _GB
        if needs.gigabytes > there:
            raise ConfigError(
                f"the training keeps {needs.gigabytes:.0f} GB on every GPU before activations, and {device} "
                f"has {there:.0f}; shard it over more GPUs (torchrun, --fsdp), or tune by --lora-rank"
            )
    return needs


def round_frozen(model: nn.Module) -> None:
    """Cast the frozen weights to bf16, as autocast would in every step."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """The inputs of one stage's training."""

    title: str  # for errors and the progress bar
    plan: StagePlan
    data: Conversations
    pad_token: int
    seed: int
    folder: Path  # of the checkpoints
    needs: Needs
    run: EvalRun


class Learned(NamedTuple):
    """The outcome of one stage's training."""

    weights: dict[str, Tensor]  # the trained ones; if the model was sharded, on the leader only
    losses: list[float]  # in nats per token, of every step


def train(model: Any, job: StageJob) -> Learned:
    """Train the parameters of `model` that require gradients, continuing from the last whole checkpoint.

    Raises:
        ConfigError: a batch that cannot be divided among the ranks.
        RadioError: the loss or a weight is not finite, or a checkpoint cannot be written.
    """
    plan, device = job.plan, job.run.device
    use_cache = vars(model.config).get("use_cache")
    lacks_images = "projector" in plan.learns and not all(job.data.modalities())
    if job.needs.is_rounded:
        round_frozen(model)
    with (
        _own_randomness(device),
        limit_threads(model, device),
        fast_products(device),
        projector_in_every_batch(model) if lacks_images else nullcontext(),
        job.run.progress(job.title, plan.steps) as advance,
    ):
        trainer = StageTrainer(model, job, advance)
        checkpoint = job.run.ranks.on_leader(trainer.last_checkpoint)
        if checkpoint is not None:
            advance(int(checkpoint.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.check_finite()
    weights = trainer.learned()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The next stage and the answers use the model: undo what the Trainer and accelerate (autocast around
    # `forward`, and a mark without which the next autocast would be left out) have changed in it.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)
    if use_cache is None:
        del model.config.use_cache
    else:
        model.config.use_cache = use_cache
    if job.needs.is_checkpointed and not job.needs.is_sharded:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
    model.zero_grad(set_to_none=True)
    model.eval()
    return Learned(weights, losses)


@final
class StageTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with LLaVA's order of samples, and checkpoints that are whole or ignored.

    The Trainer's checkpoints hold only the learned weights (all of them if accelerate shards the model). Each
    is signed after it has been written: one without a signature, of a killed run, is deleted, and so is a
    damaged one.
    """

    def __init__(self, model: Any, job: StageJob, advance: Any) -> None:
        self._job, self._advance = job, advance
        self._shown = 0.0  # when the loss was last shown
        way = "fsdp" if job.needs.is_sharded else "ddp"
        self._folder = job.folder / f"{way}-{job.run.ranks.world}-transformers-{transformers.__version__}"
        super().__init__(
            model=model,
            args=_arguments(job, self._folder, model),
            data_collator=partial(collate, pad_token=job.pad_token),
            train_dataset=job.data,
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        plan, data = self._job.plan, self._job.data
        return sample_order(data.lengths(), data.modalities(), plan.batch, plan.steps, self._job.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Create linear warm-up and a cosine to zero, rounded as in all trainings before."""
        plan = self._job.plan
        bare: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self.lr_scheduler = LambdaLR(bare, lambda step: factor(step, plan.steps, plan.warmup))
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step's loss (mean over its learned tokens and all ranks), and show it.

        Raises:
            RadioError: it is not finite.
        """
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise RadioError(
                f"{self._job.title}: the loss of step {self.state.global_step} is {logs['loss']}; lower the "
                f"learning rate, or look for values that are not finite in the encoder's tokens"
            )
        self._advance(1)
        if isinstance(self._advance, ProgressWithText) and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self._advance.set_postfix(f"loss {logs['loss']:.4f}")

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]

    def learned(self) -> dict[str, Tensor]:
        """Return the trained weights; of a sharded model whole, and on the leader only."""
        if not self.is_fsdp_enabled:
            return {name: weight.detach() for name, weight in self._learning()}
        whole = self.accelerator.get_state_dict(self.model)  # every rank takes part
        names = [name for name, _ in self._learning()] if self._job.run.ranks.leads else []
        return {name: whole[name] for name in names}

    def check_finite(self) -> None:
        """Check on every rank that the weights are finite, before they are written.

        Raises:
            RadioError: some are not; names the first.
        """
        local = [
            (name, weight.to_local() if isinstance(weight, DTensor) else weight.detach())
            for name, weight in self._learning()
        ]
        wrong = [name for name, weight in local if not bool(weight.isfinite().all())]
        names = [name for rank in self._job.run.ranks.gather_objects(wrong) for name in rank]
        if names:
            raise RadioError(
                f"{self._job.title}: {names[0]} is not finite after step {self.state.global_step}, which is "
                f"therefore not written down; lower the learning rate"
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the learned weights only; a sharded model is written by accelerate."""
        if self.args.should_save and not self.is_fsdp_enabled:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = {name: weight.contiguous() for name, weight in self.learned().items()}
            save_file(weights, Path(output_dir, "model.safetensors"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, sign it, and delete those before it; the last step has a file of its own.

        Raises:
            RadioError: a weight is not finite, or the disk is full.
        """
        step, group = self.state.global_step, self._job.run.ranks
        if step == self._job.plan.steps:
            return
        self.check_finite()
        folder = self._folder / f"checkpoint-{step}"
        problem = None
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problem = RadioError(
                f"{folder}: the state of the training cannot be written ({reason}); free some space"
            )
        group.agree(problem)
        if group.leads:
            write_text(folder / _SIGNATURE, _sign(folder))
            for path in self._folder.iterdir():
                if path != folder:
                    shutil.rmtree(path, ignore_errors=True)
        group.barrier()

    def last_checkpoint(self) -> str | None:
        """Return the last checkpoint that is whole; delete all others."""
        checkpoints = {}
        for path in self._folder.glob("checkpoint-*"):
            number = path.name.rpartition("-")[2]
            signature = path / _SIGNATURE
            if number.isdecimal() and signature.is_file():
                if signature.read_bytes() == _sign(path).encode():
                    checkpoints[int(number)] = path
                    continue
                self._job.run.damage.add(DamagedError(f"{path}: its signature does not fit its content"))
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _sign(folder: Path) -> str:
    """Hash the names and contents of a checkpoint's files."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SIGNATURE):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return sha.hexdigest()


def factor(step: int, steps: int, warmup: int) -> float:
    """Compute the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _arguments(job: StageJob, folder: Path, model: Any) -> TrainingArguments:
    plan, world, needs = job.plan, job.run.ranks.world, job.needs
    share = plan.micro_batch * world
    if plan.batch % share:
        raise ConfigError(
            f"a batch of {plan.batch} does not divide into {world} ranks of {plan.micro_batch}; choose a "
            f"--micro-batch that does"
        )
    sharding: dict[str, Any] = {}
    if needs.is_sharded:
        blocks = list(model.model.language_model._no_split_modules or ())
        config = {"transformer_layer_cls_to_wrap": blocks, "activation_checkpointing": needs.is_checkpointed}
        sharding = {"fsdp": True, "fsdp_config": config}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.batch // share,
        learning_rate=plan.lr,
        weight_decay=plan.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        bf16=job.run.dtype == torch.bfloat16,
        activation_checkpointing=needs.is_checkpointed and not needs.is_sharded,
        use_cpu=job.run.device.type == "cpu",
        ddp_backend="gloo" if world > 1 and job.run.device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=job.run.workers,
        dataloader_pin_memory=job.run.device.type == "cuda",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=plan.save_every,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=job.seed % 2**32,  # the range of the NumPy seed that transformers sets
        **sharding,
    )
    if arguments.n_gpu > 1:  # one process uses one GPU; torchrun starts one per GPU
        arguments._n_gpu = 1
    return arguments


@contextmanager
def projector_in_every_batch(model: Any) -> Iterator[None]:
    """Give the projector a zero gradient instead of none in batches without images.

    DDP waits for every weight's gradient; its search for unused ones traverses the graph at every step.
    """
    projector: nn.Module = model.model.multi_modal_projector

    def add_nothing(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        width = model.config.vision_config.hidden_size
        blank = torch.zeros(1, width, device=embedded.device, dtype=embedded.dtype)
        nothing: Tensor = 0.0 * projector(blank).sum()
        return embedded + nothing  # [B, S, E]

    handle = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()


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
