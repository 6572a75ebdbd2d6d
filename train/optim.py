"""AdamW's parameter groups, its guard against what is not finite, and the learning rate of every step."""

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
    """AdamW, fused, that clips gradients and leaves out a step by scalars on the device.

    Torch's fused kernel divides the gradients by `grad_scale`, and changes nothing where `found_inf` is 1.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def guard(self, norm: Tensor, clip: float) -> Tensor:
        """Whether the coming step is done: [] bool, false where the gradients' `norm` is not finite.

        Gradients of a norm beyond `clip` are scaled to it; 0 clips nothing.
        """
        fine = torch.isfinite(norm)
        self.found_inf = (~fine).float()
        self.grad_scale = (norm / clip).clamp(min=1.0) if clip else None
        return fine


def make_optimizer(model: nn.Module, config: OptimConfig) -> GuardedAdamW:
    """AdamW in groups: matrices and kernels decay; norms, biases, tokens and positions do not.

    Weights that are spread over the ranks lie apart from those that are not, as torch's kernels want it.
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
    for parameters in groups.values():  # here and now, so that a state can be read into them
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def exempt_from_decay(model: nn.Module) -> set[str]:
    """Collect what networks themselves exempt: timm's `no_weight_decay`, as of relative positions."""
    found = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            found |= {f"{prefix}.{name}" if prefix else name for name in exempt()}
    return found


def moments(optimizer: GuardedAdamW, model: nn.Module) -> dict[str, Tensor]:
    """What AdamW keeps of every weight, as `exp_avg.NAME` and so on."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def odd_count(optimizer: GuardedAdamW, model: nn.Module, steps: int, *, partly: str = "-") -> str:
    """What AdamW's own counts say else than `steps`, or than 0 for a weight that never had a gradient.

    Weights whose names begin with `partly` may have had a gradient in some of the steps.
    """
    counts = {name: t for name, t in moments(optimizer, model).items() if name.startswith("step.")}
    for name, count in zip(counts, torch.stack(list(counts.values())).tolist(), strict=True):
        may_be_fewer = name.startswith(f"step.{partly}") and count in range(steps)
        if count not in (0, steps) and not may_be_fewer:
            return f"{name} is {count:g}"
    return ""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then cosine annealing."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)
