"""Memory of a training stage: sharding, activation checkpointing, bf16 weights, and whether it fits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from radio.errors import ConfigError

from .settings import VqaSettings

_LARGE = 1_000_000_000  # weights from which activations are recomputed, and frozen weights are bf16
_SHARDED = 3_000_000_000  # trainable weights that fit no GPU with gradients and Adam's two moments in fp32
_GB = 1e9


class Needs(NamedTuple):
    """How a stage is trained, and the memory that every rank needs for it."""

    is_sharded: bool
    is_checkpointed: bool
    gigabytes: float  # weights, gradients and Adam's moments, without activations

    @property
    def told(self) -> str:
        """Note for the progress bar; empty below 1 GB."""
        if self.gigabytes < 1:
            return ""
        parts = [f"{self.gigabytes:.0f} GB a rank before activations"]
        parts += ["sharded"] * self.is_sharded + ["activations recomputed"] * self.is_checkpointed
        return f" ({', '.join(parts)})"


def plan_memory(model: Any, settings: VqaSettings, device: torch.device, world: int) -> Needs:
    """Decide how a stage of the model is trained; cast the frozen weights of large models to bf16 under bf16.

    Args:
        model: trainable parameters have `requires_grad`.
        world: number of ranks.

    Raises:
        ConfigError: weights, gradients and moments alone exceed the GPU's memory.
    """
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    is_sharded = world > 1 and (settings.fsdp or (device.type == "cuda" and learning >= _SHARDED))
    if settings.precision == "bf16" and count >= _LARGE and not is_sharded:
        for parameter in parameters:
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as autocast casts it in every step
    held = sum(parameter.numel() * parameter.element_size() for parameter in parameters) + 12 * learning
    wanted = settings.activation_checkpointing
    needs = Needs(
        is_sharded=is_sharded,
        is_checkpointed=count >= _LARGE if wanted is None else wanted,
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
