"""AdamW with a guard against non-finite gradients, the learning rate schedule, and the weights' average."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import OptimConfig

_UNDECAYED = ("table", "prefix")  # positions, class and register tokens


@final
class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips gradients and skips a step by scalars on the device.

    Torch's fused kernel divides the gradients by `grad_scale`, and skips the step where `found_inf` is 1.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def guard(self, norm: Tensor, clip: float) -> Tensor:
        """Prepare the next step; return whether it will be applied: [] bool, false if `norm` is not finite.

        Gradients with a norm above `clip` are scaled to it; 0 disables clipping.
        """
        fine = torch.isfinite(norm)
        self.found_inf = (~fine).float()
        self.grad_scale = (norm / clip).clamp(min=1.0) if clip else None
        return fine


def make_optimizer(model: nn.Module, config: OptimConfig) -> GuardedAdamW:
    """Build AdamW: matrices and kernels decay; norms, biases, tokens and positions do not.

    Sharded weights are in separate groups from whole ones, as torch's kernels require.
    """
    exempt = exempt_from_decay(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _UNDECAYED or name in exempt
        groups.setdefault((isinstance(parameter, DTensor), kept), []).append(parameter)
    settings = [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else config.weight_decay}
        for key in sorted(groups)
    ]
    optimizer = GuardedAdamW(settings, lr=config.lr, betas=config.betas, fused=True)
    for parameters in groups.values():  # initialised now, so that a state can be loaded into it
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def exempt_from_decay(model: nn.Module) -> set[str]:
    """Collect the weights that networks exempt by timm's `no_weight_decay`, such as relative positions."""
    names = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            names |= {f"{prefix}.{name}" if prefix else name for name in exempt()}
    return names


def moments(optimizer: GuardedAdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return AdamW's state of every weight, as `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME`."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def odd_count(optimizer: GuardedAdamW, model: nn.Module, steps: int, *, partly: str = "-") -> str:
    """Describe the first of AdamW's step counts that is neither `steps` nor 0 (never a gradient), or "".

    Weights whose names begin with `partly` may have had a gradient in only some of the steps.
    """
    counts = {name: t for name, t in moments(optimizer, model).items() if name.startswith("step.")}
    for name, count in zip(counts, torch.stack(list(counts.values())).tolist(), strict=True):
        may_be_fewer = name.startswith(f"step.{partly}") and count in range(steps)
        if count not in (0, steps) and not may_be_fewer:
            return f"{name} is {count:g}"
    return ""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Compute the learning rate of step `step` (from 0) of `steps`: linear warm-up, then cosine annealing."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)


@final
class Average:
    """An exponential moving average of the weights on this rank.

    Args:
        model: its weights are averaged and are the start.
        decay: factor of the old average in every step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, fine: Tensor) -> None:
        """Move the average towards the current weights, unless `fine` ([] bool) is False: a skipped step."""
        averages = [to_local(tensor) for tensor in self.tensors.values()]
        weights = [to_local(weight.detach()) for weight in self._weights.values()]
        share = (1 - self.decay) * fine
        torch._foreach_lerp_(averages, weights, [share] * len(averages))


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
