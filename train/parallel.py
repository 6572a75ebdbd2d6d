"""Ranks under torchrun: the student over all of them by DDP or FSDP2, adaptors over those that share them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, final

import torch
import torch.distributed as distributed
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from evals.core.dist import Group, joined
from radio.errors import ConfigError
from radio.types import Features, Student

from .config import TrainConfig
from .partition import Partition
from .step import Distiller, StudentPass

# Letters: B batch, h w pixels.


class Peers(NamedTuple):
    """The ranks that work for the same teachers as this one, and hold the same adaptors."""

    ranks: tuple[int, ...]
    process_group: distributed.ProcessGroup | None  # None = of all ranks, or there is no other
    leaders: tuple[int, ...]  # the first rank of every such set

    def lead(self, rank: int) -> bool:
        """Whether this rank is the one that counts their adaptors."""
        return rank == self.ranks[0]


def join(device: torch.device) -> AbstractContextManager[Group]:
    """The group that torchrun's environment describes: over NCCL on GPUs, gloo on CPUs; alone without it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return joined("nccl" if device.type == "cuda" else "gloo")


def find_peers(partition: Partition, rank: int) -> Peers:
    """This rank's peers. Every rank calls it, since all of them make every process group."""
    everyone = tuple(range(partition.world))
    mine = partition.of(rank)[0].ranks
    found = None
    for ranks in dict.fromkeys(group.ranks for group in partition.groups):
        if ranks != everyone and len(ranks) > 1:
            made = distributed.new_group(list(ranks))
            if ranks == mine:
                assert isinstance(made, distributed.ProcessGroup)  # this rank is in it
                found = made
    leaders = dict.fromkeys(group.ranks[0] for group in partition.groups)
    return Peers(mine, found, tuple(leaders))


@final
class Engine:
    """The student's forward over the ranks, and gradients that are those of the whole step.

    A step's loss is the sum over the groups of teachers of the mean loss over each group's pictures. DDP and
    FSDP2 average gradients over all ranks, so a rank of a group of n scales its loss by world / n; adaptors
    are summed over their own ranks and divided by world, to the same end.

    Args:
        distiller: student and adaptors, on the device.
        group: all ranks.
        peers: those that share this rank's adaptors.
        device: where this rank computes.
        config: engine, precision, compilation.
    """

    def __init__(
        self, distiller: Distiller, group: Group, peers: Peers, device: torch.device, config: TrainConfig
    ) -> None:
        self.group, self.peers, self.scale = group, peers, group.world / len(peers.ranks)
        student = distiller.model.student
        assert isinstance(student, nn.Module)  # as RadioModel makes sure
        if device.type == "cuda":  # on a CPU there is no such kernel: each rank's own batch
            synchronise_norms(student, peers)
        if config.compile:
            for module in blocks_of(student) or [student]:
                module.forward = torch.compile(module.forward)
        self._pass: Any = StudentPass(student)
        if config.engine == "fsdp":
            _shard(self._pass, device, group.world, half=is_half(config, device))
        elif group.world > 1:
            devices = [device.index] if device.type == "cuda" else None
            self._pass = DistributedDataParallel(self._pass, device_ids=devices)
            self._pass.broadcast_buffers = False  # after the first time; torch changed the argument's name
        ids = {id(parameter) for parameter in student.parameters()}
        self._shared = list(student.parameters())
        self._local = [parameter for parameter in distiller.parameters() if id(parameter) not in ids]

    def encode(self, images: Tensor, drawn: Tensor | None, window: int | None) -> Features:
        """The student's features of this rank's [B, 3, h, w] pictures."""
        features: Features = self._pass(images, drawn, window)
        return features

    @contextmanager
    def turn(self, *, last: bool) -> Iterator[None]:
        """Inside go one forward and its backward; the ranks exchange gradients in a step's last."""
        if isinstance(self._pass, FSDPModule):
            self._pass.set_requires_gradient_sync(last)
            yield
        elif isinstance(self._pass, DistributedDataParallel) and not last:
            with self._pass.no_sync():
                yield
        else:
            yield

    def settle(self, loss: Tensor) -> Tensor:
        """The gradients' norm over student and all adaptors of all ranks: [], the same on every rank.

        Called after a step's last backward; the adaptors' gradients are averaged on the way. Not finite
        where `loss` is not finite on any rank.
        """
        self._average()
        square = 0 * loss.detach().float()
        sharded = isinstance(self._pass, FSDPModule)
        if sharded or self.group.leads:
            square = square + _square(self._shared, square)
        if self.peers.lead(self.group.rank):
            square = square + _square(self._local, square)
        if self.group.world > 1:
            distributed.all_reduce(square)
        return square.sqrt()

    def peer_mean(self, tensor: Tensor) -> Tensor:
        """The elementwise mean over the ranks that share this rank's teachers."""
        if len(self.peers.ranks) == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total, group=self.peers.process_group)
        return total / len(self.peers.ranks)

    def _average(self) -> None:
        """Sum the adaptors' gradients over the peers, and divide by the world as the student's are."""
        if self.group.world == 1:
            return
        grads = [parameter.grad for parameter in self._local if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]).div_(self.group.world)
        if len(self.peers.ranks) > 1:
            distributed.all_reduce(flat, group=self.peers.process_group)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def synchronise_norms(student: nn.Module, peers: Peers) -> None:
    """Let batch norms take their statistics over the ranks that see images of one group; in place.

    timm's converter, and not torch's, which would lose the activation inside timm's `BatchNormAct2d`.
    """
    if len(peers.ranks) > 1:
        convert_sync_batchnorm(student, peers.process_group)


def check_shardable(student: Student) -> None:
    """Refuse a student that FSDP2 cannot spread over the ranks, before anything is loaded.

    Raises:
        ConfigError: a weight that is a single number or empty; names it.
    """
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    for name, weight in student.named_parameters():
        if weight.ndim == 0 or weight.numel() == 0:
            what = "a single number" if weight.ndim == 0 else "empty"
            raise ConfigError(
                f"--engine fsdp cannot shard this student: its weight {name} is {what}; take --engine ddp"
            )


def check_started(config: TrainConfig) -> None:
    """Refuse to shard without the ranks that torchrun starts.

    Raises:
        ConfigError: the run shards its student, and there is no group of ranks.
    """
    if config.engine == "fsdp" and not distributed.is_initialized():
        raise ConfigError(
            "--engine fsdp shards the student over ranks, and this process was started alone; "
            "start it with torchrun --nproc-per-node GPUS, or leave --engine out"
        )


def is_half(config: TrainConfig, device: torch.device) -> bool:
    """Whether forwards run in bfloat16."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def blocks_of(student: nn.Module) -> list[nn.Module]:
    """The blocks that a student is a stack of: what its outermost lists of modules hold."""
    found: list[nn.Module] = []
    for child in student.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def gather_weights(tensors: Mapping[str, Tensor], group: Group, peers: Peers) -> dict[str, Tensor]:
    """Copies on the CPU of all weights of a model, those of every rank's adaptors among them.

    Every rank calls it with what it has of the model's state dict; the first rank gets them, others nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if peers.lead(group.rank):
            found[name] = whole.detach().to("cpu", copy=True)
    if group.leads:
        for source in peers.leaders[1:]:
            parcel: list[Any] = [None]
            distributed.recv_object_list(parcel, source, group=group.process_group)
            found.update(parcel[0])
        return found
    if peers.lead(group.rank):
        adaptors = {name: found[name] for name in found if name.startswith("adaptors.")}
        distributed.send_object_list([adaptors], 0, group=group.process_group)
    return {}


def _shard(module: StudentPass, device: torch.device, world: int, *, half: bool) -> None:
    """Spread every block's weights over the ranks, and what is outside the blocks once more (FSDP2).

    Inputs are left as they are: position crops and pictures need more than bfloat16, and autocast casts them
    where a kernel wants it.
    """
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")  # nobody writes into them
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (*blocks_of(module.student), module):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def _square(parameters: list[nn.Parameter], like: Tensor) -> Tensor:
    """The squared norm of the gradients that lie on this rank: []."""
    grads = [_own(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros_like(like)
    return torch.stack(torch._foreach_norm(grads)).square().sum()


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be spread over the ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
