"""AdamW, Muon and LAMB with a guard against non-finite gradients, the learning rate, the weights' average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import parametrize

from .config import OptimConfig
from .reparametrise import SpectralWeight

# Letters: R rows and C columns of a matrix.

_UNDECAYED = ("table", "prefix")  # positions, class and register tokens

# Muon's momentum, iterations and coefficients are K. Jordan's; the root mean square of an update, with which
# AdamW's learning rates and decays carry over, is J. Liu's (arXiv:2502.16982).
_MOMENTUM, _ITERATIONS, _COEFFICIENTS, _RMS = 0.95, 5, (3.4445, -4.7750, 2.0315), 0.2

_EPS = {"adamw": 1e-8, "muon": 1e-8, "lamb": 1e-6}  # added to the root of the second moment


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


class MatrixOptimizer(GuardedAdamW):
    """AdamW for the groups without `matrices`; a subclass moves the weights of the others."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do one step by the gradients that the weights have; a closure is not called."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["matrices"] and weights:
                self._move(weights, group)

    def _move(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Apply a step to weights with gradients, [R, C] or [R, ...], all whole or all sharded."""
        raise NotImplementedError

    def _read_gradients(self, weights: list[nn.Parameter]) -> tuple[list[Tensor], Tensor]:
        """Return this rank's parts of the clipped gradients, and 1 or, for a skipped step, 0: []."""
        fine = to_local(weights[0].detach()).new_ones(()) if self.found_inf is None else 1 - self.found_inf
        scale = 1.0 if self.grad_scale is None else self.grad_scale
        grads = [to_local(weight.grad) / scale for weight in weights if weight.grad is not None]
        return [torch.where(fine > 0, grad, 0.0) for grad in grads], fine  # nan times 0 would be nan

    def _locals(self, name: str, weights: list[nn.Parameter]) -> list[Tensor]:
        """Return this rank's parts of the weights' states of a name."""
        return [to_local(self.state[weight][name]) for weight in weights]


@final
class Muon(MatrixOptimizer):
    """Muon for the groups with `matrices` set, AdamW for the others; both with the guard of `GuardedAdamW`.

    A matrix moves along its orthogonalised momentum, so that all its directions learn at one speed. Every
    rank orthogonalises whole matrices, of which it then applies its own part.
    """

    def _move(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Apply a step to weights [R, C] or [R, ...]."""
        grads, fine = self._read_gradients(weights)
        momenta = self._locals("exp_avg", weights)
        torch._foreach_lerp_(momenta, grads, [(1 - _MOMENTUM) * fine] * len(grads))
        torch._foreach_add_(self._locals("step", weights), fine)
        ahead = torch._foreach_lerp(grads, momenta, _MOMENTUM)  # Nesterov's
        wholes = [_whole(update, weight).flatten(1) for update, weight in zip(ahead, weights, strict=True)]
        for weight, update in zip(weights, orthogonalise(wholes), strict=True):
            rate = group["lr"] * _RMS * max(update.shape) ** 0.5
            local = to_local(weight)
            local.mul_(1 - group["lr"] * group["weight_decay"] * fine)
            local.sub_(_part(update.reshape(weight.shape), weight) * (rate * fine))


@final
class Lamb(MatrixOptimizer):
    """LAMB (arXiv:1904.00962) for the groups with `matrices` set, AdamW for the others; both with the guard.

    A weight moves by its own norm: AdamW's direction plus the decay times the weight is scaled to the norm of
    the weight (by 1 where one of both is zero). This is timm's `Lamb` with `always_adapt` for matrices and
    kernels and its defaults otherwise: gradients averaged, bias corrected, ratios not clipped, no caution,
    and a decay inside the scaled direction. What does not decay (norms, biases, tokens) is not scaled; nor is
    the s of spectral weights, which could never cross 0.
    """

    def _move(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Apply a step to weights [R, C] or [R, ...]; norms are those of whole weights."""
        grads, fine = self._read_gradients(weights)
        first, second = self._locals("exp_avg", weights), self._locals("exp_avg_sq", weights)
        counts = self._locals("step", weights)
        torch._foreach_add_(counts, fine)
        powers = torch.stack(counts).double().clamp(min=1)  # a skipped first step divides by no zero
        low, high = (1 - beta**powers for beta in group["betas"])  # [weights] each: bias corrections
        torch._foreach_lerp_(first, grads, [(1 - group["betas"][0]) * fine] * len(grads))
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_lerp_(second, squares, [(1 - group["betas"][1]) * fine] * len(grads))
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, list(high.sqrt().float().unbind()))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, list(low.float().unbind()))
        torch._foreach_div_(updates, roots)
        local = [to_local(weight) for weight in weights]
        torch._foreach_add_(updates, local, alpha=group["weight_decay"])
        norms = torch.stack([*torch._foreach_norm(local), *torch._foreach_norm(updates)]).square()
        if isinstance(weights[0], DTensor):
            distributed.all_reduce(norms, group=weights[0].device_mesh.get_group())
        of_weights, of_updates = norms.sqrt().chunk(2)
        scaled = (of_weights > 0) & (of_updates > 0)
        rates = torch.where(scaled, of_weights / of_updates, 1.0) * (-group["lr"] * fine)
        torch._foreach_mul_(updates, list(rates.unbind()))
        torch._foreach_add_(local, updates)


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Bring the singular values of matrices [R, C] to about 1 (0.6 to 1.3), by Newton and Schulz's iteration.

    In bfloat16 on a GPU, matrices of one shape at a time.
    """
    done: dict[int, Tensor] = {}
    wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    for shape in dict.fromkeys(matrix.shape for matrix in wide):
        places = [place for place, matrix in enumerate(wide) if matrix.shape == shape]
        x = torch.stack([wide[place] for place in places])
        x = x.bfloat16() if x.is_cuda else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = _COEFFICIENTS
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        done |= dict(zip(places, x.float(), strict=True))
    return [
        done[place].mT if matrix.shape[0] > matrix.shape[1] else done[place]
        for place, matrix in enumerate(matrices)
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> GuardedAdamW:
    """Build the optimizer: matrices and kernels decay; norms, biases, tokens and positions do not.

    Sharded weights are in separate groups from whole ones, as torch's kernels require.
    """
    exempt = exempt_from_decay(model)
    matrices = {id(weight) for weight in (muon_weights(model) if config.kind == "muon" else ())}
    if config.kind == "lamb":
        scales = {id(module.s) for module in model.modules() if isinstance(module, SpectralWeight)}
        matrices = {id(weight) for weight in model.parameters()} - scales
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _UNDECAYED or name in exempt
        key = (isinstance(parameter, DTensor), kept, not kept and id(parameter) in matrices)
        groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else config.weight_decay, "matrices": key[2]}
        for key in sorted(groups)
    ]
    make = {"adamw": GuardedAdamW, "muon": Muon, "lamb": Lamb}[config.kind]
    optimizer = make(settings, lr=config.lr, betas=config.betas, eps=_EPS[config.kind], fused=True)
    for (_, _, moved), parameters in groups.items():  # now, so that a state can be loaded into it
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                **({} if moved and config.kind == "muon" else {"exp_avg_sq": torch.zeros_like(parameter)}),
            }
    return optimizer


def muon_weights(model: nn.Module) -> list[Tensor]:
    """Collect what Muon moves: the weights of linear layers, and of convolutions that mix channels."""
    return [
        module.get_parameter("parametrizations.weight.original")
        if parametrize.is_parametrized(module, "weight")
        else module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]


def exempt_from_decay(model: nn.Module) -> set[str]:
    """Collect the weights that networks exempt by timm's `no_weight_decay`, such as relative positions."""
    names = set()
    for prefix, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", None)
        if callable(exempt):
            names |= {f"{prefix}.{name}" if prefix else name for name in exempt()}
    return names


def moments(optimizer: GuardedAdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return every weight's state: `step.NAME`, `exp_avg.NAME`, and but for Muon's `exp_avg_sq.NAME`."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def odd_count(optimizer: GuardedAdamW, model: nn.Module, steps: int, *, partly: str = "-") -> str:
    """Describe the first of the step counts that is neither `steps` nor 0 (never a gradient), or "".

    Weights whose names begin with `partly` may have had a gradient in only some of the steps.
    """
    counts = {name: t for name, t in moments(optimizer, model).items() if name.startswith("step.")}
    for name, count in zip(counts, torch.stack(list(counts.values())).tolist(), strict=True):
        may_be_fewer = name.startswith(f"step.{partly}") and count in range(steps)
        if count not in (0, steps) and not may_be_fewer:
            return f"{name} is {count:g}"
    return ""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Compute the learning rate of step `step` (from 0) of `steps`: linear warm-up, then the decay."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
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
    def start_from(self, averages: Mapping[str, Tensor]) -> None:
        """Replace the averages by whole ones, by name."""
        for name, tensor in self.tensors.items():
            local = to_local(tensor)
            local.copy_(_part(averages[name].to(local.device), self._weights[name]))

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


def _whole(part: Tensor, weight: Tensor) -> Tensor:
    """Gather a tensor of which this rank has the same part as of the weight."""
    if not isinstance(weight, DTensor):
        return part
    mesh, places = weight.device_mesh, weight.placements
    sharded = DTensor.from_local(part, mesh, places, shape=weight.shape, stride=weight.stride())
    return sharded.full_tensor()


def _part(whole: Tensor, weight: Tensor) -> Tensor:
    """Return the part of a tensor that this rank has of the weight."""
    if not isinstance(weight, DTensor):
        return whole
    replicated = DTensor.from_local(whole, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim)
    return replicated.redistribute(placements=weight.placements).to_local()
