"""How a run learns the weights W of linear layers: spectral reparametrisation, and DAMP's noise on them.

Both are torch parametrizations of the layers, for the time of a run only: what it publishes has W itself,
under the names and with the shapes of any other run.

`--spectral` learns V and s, with W = V * (softplus(s) + 0.05) / sigma(V). The largest singular value of W is
then softplus(s) + 0.05, which weight decay acts on through s (PHI-S; C-RADIO). sigma(V) = |V v| is tracked by
one step of power iteration before every training step. All linear layers of student and adaptors have it,
except those of patch embeddings and positions (ours: which layers of C-RADIOv4 have it is not published).

`--damp` multiplies each W of the student with 1 + sigma * xi in every training step, with normal xi that are
drawn anew (DAMP; sigma, and one draw for all images of a step, are ours). With both options the noise is on
W: sigma(V) knows nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from radio.errors import ConfigError
from radio.model import RadioModel

from .config import TrainConfig
from .data.crops import seed_of

# Letters: N matrices of a layer, R rows of each, C columns; W and V are [N*R, C].

_FLOOR = 0.05  # PHI-S's lower bound of a matrix's largest singular value
_LEAST = 1e-4  # softplus(s) of a matrix that starts at the bound
_LEARNED = "parametrizations.weight.original"  # the name of V in its layer
_SPECTRAL = "parametrizations.weight.0"
_PARTS = {"qkv": 3, "kv": 2}  # matrices of layers of these names, one below the other
# Patch embeddings and positions: ours, E-RADIO's and timm's.
_LEFT_OUT = re.compile(r"(^|\.)(stem|patch_embed|embeds|positions|pos_embed|rel_pos|cpb_mlp)(\.|$)")


@final
class SpectralWeight(nn.Module):
    """Map V to W = V * (softplus(s) + 0.05) / sigma(V); at the start W is V.

    Args:
        weight: V [N*R, C] at the start.
        num_matrices: N.
        raise_small: as for `decompose`.

    Raises:
        ValueError: some matrix has a largest singular value below 0.05.
    """

    def __init__(self, weight: Tensor, num_matrices: int, *, raise_small: bool = False) -> None:
        super().__init__()
        s, u, v = decompose(weight, num_matrices, raise_small=raise_small)
        self.s = nn.Parameter(s)  # [N, 1]: of two dimensions, so that it decays
        self.u = nn.Buffer(u)  # [N, R]
        self.v = nn.Buffer(v, persistent=False)  # [N, C], a function of u and V

    def forward(self, weight: Tensor) -> Tensor:
        """Compute W of V, both [N*R, C]; in float32, also inside autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            return spectral_weight(weight.float(), self.s.float(), self.u, self.v)

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """Do one step of power iteration with the whole V [N*R, C]."""
        for held, new in zip((self.u, self.v), iterate(weight, self.u), strict=True):
            held.copy_(new)


@final
class NoisyWeight(nn.Module):
    """Multiply a weight, in training, elementwise with a factor around 1.

    Args:
        weight: one of the same shape.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Buffer(torch.ones_like(weight), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Multiply [N*R, C]; return it unchanged in evaluation."""
        return weight * self.factor if self.training else weight


def spectral_weight(weight: Tensor, s: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Compute V * (softplus(s) + 0.05) / sigma(V), with sigma(V) = u' V v of every matrix; differentiable.

    Args:
        weight: V [N*R, C].
        s: [N, 1].
        u: [N, R], of length 1.
        v: [N, C], of length 1.
    """
    matrices = weight.unflatten(0, (len(u), -1))
    sigma = ((matrices @ v[:, :, None]).squeeze(2) * u).sum(1, keepdim=True)
    factor = (F.softplus(s) + _FLOOR) / sigma
    scaled: Tensor = (matrices * factor[:, :, None]).flatten(0, 1)
    return scaled


def iterate(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Do a step of power iteration for V [N*R, C] from u [N, R]; return the next u [N, R] and v [N, C]."""
    matrices = weight.unflatten(0, (len(u), -1))
    v = F.normalize((u[:, None, :] @ matrices).squeeze(1), dim=1)
    return F.normalize((matrices @ v[:, :, None]).squeeze(2), dim=1), v


@torch.no_grad()
def decompose(
    weight: Tensor, num_matrices: int, *, raise_small: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Find s [N, 1], u [N, R], v [N, C] with which `spectral_weight` of W [N*R, C] is W, without iterations.

    Args:
        weight: W.
        num_matrices: N.
        raise_small: give a matrix 0.05 as its largest singular value where that is less, instead of an error.

    Raises:
        ValueError: some matrix has a largest singular value below 0.05.
    """
    matrices = weight.double().unflatten(0, (num_matrices, -1))
    wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    vector = torch.linalg.eigh(gram)[1][:, :, -1:]  # of the largest eigenvalue
    v = F.normalize((matrices.mT @ vector if wide else vector).squeeze(2), dim=1)
    u = (matrices @ v[:, :, None]).squeeze(2)
    sigma = u.norm(dim=1, keepdim=True)
    excess = sigma - _FLOOR
    if not raise_small and not bool((excess > -_LEAST).all()):
        raise ValueError(
            f"its largest singular value is {float(sigma.min()):.3g}, and {_FLOOR} is the least that a "
            f"spectral weight has"
        )
    excess = excess.clamp(min=_LEAST)
    s = excess + torch.log(-torch.expm1(-excess))  # softplus's inverse
    return s.to(weight.dtype), (u / sigma).to(weight.dtype), v.to(weight.dtype)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear layers of a module by name, except those of patch embeddings and positions."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not _LEFT_OUT.search(name)
    }


def noisy_layers(model: RadioModel) -> dict[str, nn.Linear]:
    """Find the student's linear layers, which `--damp` acts on, by their names in the model.

    Raises:
        ConfigError: it has none.
    """
    layers = {
        f"student.{name}": layer for name, layer in linear_layers(model.get_submodule("student")).items()
    }
    if not layers:
        raise ConfigError(
            f"--damp changes the weights of linear layers, and student {model.student.name} has none; leave "
            f"it out"
        )
    return layers


@final
class Reparametrisation:
    """The reparametrised layers of a run's model, which this changes in place; none by default.

    Args:
        model: on the device, with plain weights, not distributed yet.
        config: the run's settings.
        written: layers, by name, that `write` fills later; until then their weights may be too small.

    Raises:
        ConfigError: a weight is too small for `--spectral`, or there is nothing for `--damp`.
    """

    def __init__(self, model: RadioModel, config: TrainConfig, written: Collection[str] = ()) -> None:
        self._model, self._damp, self._seed = model, config.damp, config.seed
        self._written = written
        self._names = list(model.state_dict())
        self._spectral: dict[str, SpectralWeight] = {}
        self._noisy: dict[str, NoisyWeight] = {}
        noisy = noisy_layers(model) if config.damp else {}
        for name, layer in (linear_layers(model) if config.spectral else {}).items():
            parts = _PARTS.get(name.rpartition(".")[2], 1)
            num = 1 if layer.out_features % parts else parts
            try:
                spectral = SpectralWeight(layer.weight, num, raise_small=name in written)
            except ValueError as error:
                raise _too_small(name, error) from error
            parametrize.register_parametrization(layer, "weight", spectral)
            self._spectral[name] = spectral
        for name, layer in noisy.items():
            noise = NoisyWeight(layer.weight)
            parametrize.register_parametrization(layer, "weight", noise)
            self._noisy[name] = noise

    @cached_property
    def _learned(self) -> dict[str, Tensor]:
        """V of every spectral layer; FSDP2 puts others in their places during a forward."""
        return {name: self._model.get_parameter(f"{name}.{_LEARNED}") for name in self._spectral}

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Prepare a training step, without a host sync; every rank calls it before its first forward."""
        for name, spectral in self._spectral.items():
            spectral.advance(_whole(self._learned[name]))
        if self._noisy:
            device = next(iter(self._noisy.values())).factor.device
            drawn = torch.Generator(device).manual_seed(seed_of(self._seed, "damp", step))
            for noise in self._noisy.values():
                noise.factor.normal_(1.0, self._damp, generator=drawn)

    @torch.no_grad()
    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's plain weights for what it learns, as in its next forward but without noise.

        Args:
            weights: parameters, also averaged or sharded ones, or the state dict, by name. Spectral weights
                are returned whole, other tensors as they are.
        """
        plain = {}
        for name in self._names:
            layer = name.removesuffix(".weight")
            learned = f"{layer}.{_LEARNED}"
            if learned not in weights:
                if name in weights:
                    plain[name] = weights[name]
            elif layer not in self._spectral:
                plain[name] = weights[learned]
            else:
                whole, s = _whole(weights[learned]), _whole(weights[f"{layer}.{_SPECTRAL}.s"])
                plain[name] = spectral_weight(whole, s, *iterate(whole, self._spectral[layer].u))
        return plain

    @torch.no_grad()
    def buffers_for(self, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers, by name, with which a forward of whole averages has the weights of `fold`."""
        buffers: dict[str, Tensor] = {}
        for name, spectral in self._spectral.items():
            vectors = iterate(averages[f"{name}.{_LEARNED}"], spectral.u)
            buffers |= {f"{name}.{_SPECTRAL}.{each}": t for each, t in zip("uv", vectors, strict=True)}
        for name, noise in self._noisy.items():
            at = f"{name}.parametrizations.weight.{int(name in self._spectral)}.factor"
            buffers[at] = noise.factor.new_ones(())
        return buffers

    def at_start(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's plain weights, by name, before the first step, when V is W itself.

        Unlike `fold` this is exact, also for averages, which u and v are not of.

        Args:
            weights: all parameters, also averaged or sharded ones, by name; they are returned as they are.
        """
        return {
            name.replace(_LEARNED, "weight"): tensor
            for name, tensor in weights.items()
            if not name.endswith(f".{_SPECTRAL}.s")
        }

    def unfold(self, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the model learns, by name, for its plain weights: the inverse of `fold`.

        Raises:
            ConfigError: a weight is too small for `--spectral`, and not still to be written.
        """
        learned = {}
        for name, weight in plain.items():
            layer = name.removesuffix(".weight")
            if layer in self._spectral:
                learned[f"{layer}.{_LEARNED}"] = weight
                learned[f"{layer}.{_SPECTRAL}.s"] = self._decompose(layer, weight, layer in self._written)[0]
            else:
                learned[f"{layer}.{_LEARNED}" if layer in self._noisy else name] = weight
        return learned

    @torch.no_grad()
    def write(self, plain: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Set what is learned, by name and in place, so that these plain weights are the model's.

        The vectors u and v become theirs: weights that are averages are written before the model's own.

        Raises:
            ConfigError: a weight is too small for `--spectral`.
        """
        for name, tensor in self.unfold(plain).items():
            weights[name].copy_(tensor)
        for name, weight in plain.items():
            layer = name.removesuffix(".weight")
            if layer in self._spectral:
                _, self._spectral[layer].u[:], self._spectral[layer].v[:] = self._decompose(layer, weight)

    def _decompose(
        self, layer: str, weight: Tensor, raise_small: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return decompose(weight, len(self._spectral[layer].u), raise_small=raise_small)
        except ValueError as error:
            raise _too_small(layer, error) from error


def _too_small(layer: str, error: ValueError) -> ConfigError:
    return ConfigError(
        f"--spectral: {layer}.weight: {error}; leave --spectral out, or start from other weights"
    )


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
