"""Training under torchrun: the student by DDP or FSDP2, adaptors on the ranks that share them; preemption."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self, TypeVar, final

import torch
import torch.distributed as distributed
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from radio.dist import Ranks, joined
from radio.errors import ConfigError
from radio.model import RadioModel
from radio.students.vit import ViT
from radio.types import Features, Student

from .config import TrainConfig
from .data.loader import STOP_SIGNALS
from .groups import Partition, TeacherGroup
from .losses import DistillationLoss
from .optim import to_local

# Letters: B batch, h w pixels.

T = TypeVar("T")

REQUEUE = 85  # exit code of a run that was stopped by a signal and has saved: start it again


class Peers(NamedTuple):
    """The ranks with the same adaptors as this one."""

    ranks: tuple[int, ...]
    share: int  # number of those that take part in the same images
    process_group: distributed.ProcessGroup | None  # None = all ranks, or this one only
    leaders: tuple[int, ...]  # the first rank of every such set

    def lead(self, rank: int) -> bool:
        """Check whether this rank is the first of its peers, which counts their adaptors."""
        return rank == self.ranks[0]


def join(device: torch.device) -> AbstractContextManager[Ranks]:
    """Join torchrun's process group, by NCCL on GPUs and gloo on CPUs; a group of one without torchrun."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return joined("nccl" if device.type == "cuda" else "gloo")


def find_peers(partition: Partition, rank: int) -> Peers:
    """Return this rank's peers. Every rank calls it, since each process group is created by all ranks."""
    everyone = tuple(range(partition.world))
    sets = [_ranks_of(partition.peers(group.ranks[0])) for group in partition.groups]
    local = _ranks_of(partition.peers(rank))
    process_group = None
    for ranks in dict.fromkeys(sets):
        if ranks != everyone and len(ranks) > 1:
            made = distributed.new_group(list(ranks))
            if ranks == local:
                assert isinstance(made, distributed.ProcessGroup)  # this rank is in it
                process_group = made
    leaders = dict.fromkeys(ranks[0] for ranks in sets)
    # A dedicated rank has one group; groups on shared ranks all have the same ranks.
    return Peers(local, len(partition.of(rank)[0].ranks), process_group, tuple(leaders))


def _ranks_of(groups: Sequence[TeacherGroup]) -> tuple[int, ...]:
    return tuple(sorted({rank for group in groups for rank in group.ranks}))


class StudentPass(nn.Module):
    """The student with the attention window of a step: the module that DDP or FSDP2 wraps."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        assert isinstance(student, nn.Module)  # as RadioModel makes sure
        self.student = student

    def forward(self, images: Tensor, crops: Tensor | None, window: int | None) -> Features:
        """Compute features of [B, 3, h, w] RGB in [0, 1]; None keeps the student's own window."""
        student: Student = self.student
        if window is not None:
            assert student.with_window is not None  # as choose_windows makes sure
            student = student.with_window(window)
        return student(images, crops)


@final
class DistributedStudent:
    """The student's distributed forward, with gradients of the whole step's loss.

    A step's loss is the sum over the groups of teachers of the mean loss over each group's images. DDP and
    FSDP2 average gradients over all ranks, so a rank of a group with n ranks scales its loss by world / n;
    adaptors' gradients are summed over their own ranks and divided by world, to the same effect.

    Args:
        loss: student, adaptors and balancer, on the device.
        ranks: all ranks.
        peers: the ranks that share this rank's adaptors.
        device: this rank's device.
        config: DDP or FSDP2, precision, compilation.
    """

    def __init__(
        self,
        loss: DistillationLoss,
        ranks: Ranks,
        peers: Peers,
        device: torch.device,
        config: TrainConfig,
    ) -> None:
        self.ranks, self.peers, self.scale = ranks, peers, ranks.world / peers.share
        student = loss.model.student
        assert isinstance(student, nn.Module)  # as RadioModel makes sure
        if device.type == "cuda":  # no such kernel on a CPU: statistics of each rank's batch
            synchronise_norms(student, peers)
        if config.compile:
            for module in blocks_of(student) or [student]:
                module.forward = torch.compile(module.forward)
        self._pass: Any = StudentPass(student)
        if config.parallel == "fsdp":
            _shard(self._pass, device, ranks.world, half=is_half(config, device))
        elif ranks.world > 1:
            devices = [device.index] if device.type == "cuda" else None
            self._pass = DistributedDataParallel(self._pass, device_ids=devices)
            self._pass.broadcast_buffers = False  # after construction; torch renamed the argument
        ids = {id(parameter) for parameter in student.parameters()}
        self._shared = list(student.parameters())
        self._local = [parameter for parameter in loss.parameters() if id(parameter) not in ids]

    def encode(self, images: Tensor, crops: Tensor | None, window: int | None) -> Features:
        """Compute the student's features of this rank's images [B, 3, h, w]."""
        features: Features = self._pass(images, crops, window)
        return features

    def encode_frozen(self, images: Tensor, crops: Tensor | None, window: int | None) -> Features:
        """Compute the same features without gradients: the optimizer passes over weights that have none."""
        with torch.no_grad():
            return self.encode(images, crops, window)

    @contextmanager
    def turn(self, *, last: bool) -> Iterator[None]:
        """Wrap one forward and its backward; the ranks exchange gradients only in a step's `last`."""
        if isinstance(self._pass, FSDPModule):
            self._pass.set_requires_gradient_sync(last)
            yield
        elif isinstance(self._pass, DistributedDataParallel) and not last:
            with self._pass.no_sync():
                yield
        else:
            yield

    def reduce_gradients(self, loss: Tensor) -> Tensor:
        """Compute the gradient norm over student and all ranks' adaptors: [], the same on every rank.

        Call it after a step's last backward; it also averages the adaptors' gradients. The norm is not
        finite if `loss` is not finite on some rank.
        """
        self._average()
        square = 0 * loss.detach().float()
        sharded = isinstance(self._pass, FSDPModule)
        if sharded or self.ranks.leads:
            square = square + _square(self._shared, square)
        if self.peers.lead(self.ranks.rank):
            square = square + _square(self._local, square)
        if self.ranks.world > 1:
            distributed.all_reduce(square)
        return square.sqrt()

    def peer_sum(self, tensor: Tensor) -> Tensor:
        """Compute the elementwise sum over the ranks that share this rank's adaptors."""
        if len(self.peers.ranks) == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total, group=self.peers.process_group)
        return total

    def share_buffers(self, module: nn.Module) -> None:
        """Give the buffers of the first of this rank's peers to the others."""
        if len(self.peers.ranks) > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, self.peers.ranks[0], group=self.peers.process_group)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy all weights of a model, including every rank's adaptors, to the first rank's CPU.

        Every rank calls it with its part of the model's state dict; ranks but the first get an empty dict.
        """
        local: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.peers.lead(self.ranks.rank):
                local[name] = whole.detach().to("cpu", copy=True)
        if self.ranks.leads:
            for source in self.peers.leaders[1:]:
                received: list[Any] = [None]
                distributed.recv_object_list(received, source, group=self.ranks.process_group)
                local.update(received[0])
            return local
        if self.peers.lead(self.ranks.rank):
            adaptors = {name: local[name] for name in local if name.startswith("adaptors.")}
            distributed.send_object_list([adaptors], 0, group=self.ranks.process_group)
        return {}

    def _average(self) -> None:
        """Sum the adaptors' gradients over the peers and divide by the world size, like the student's."""
        if self.ranks.world == 1:
            return
        if self.peers.share < len(self.peers.ranks):  # other peers may have losses for other adaptors
            for parameter in self._local:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self._local if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]).div_(self.ranks.world)
        if len(self.peers.ranks) > 1:
            distributed.all_reduce(flat, group=self.peers.process_group)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def synchronise_norms(student: nn.Module, peers: Peers) -> None:
    """Synchronise batch norm statistics over the ranks of one group, in place.

    By timm's converter: torch's would drop the activation inside timm's `BatchNormAct2d`.
    """
    if len(peers.ranks) > 1:
        convert_sync_batchnorm(student, peers.process_group)


def check_shardable(student: Student) -> None:
    """Check that FSDP2 can shard the student, before anything is loaded.

    Raises:
        ConfigError: a weight is a single number or empty; the message names it.
    """
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    for name, weight in student.named_parameters():
        if weight.ndim == 0 or weight.numel() == 0:
            what = "a single number" if weight.ndim == 0 else "empty"
            raise ConfigError(
                f"--parallel fsdp cannot shard this student: its weight {name} is {what}; take --parallel ddp"
            )


def check_started(config: TrainConfig) -> None:
    """Check that a sharded run was started with torchrun.

    Raises:
        ConfigError: the run shards its student, and there is no process group.
    """
    if config.parallel == "fsdp" and not distributed.is_initialized():
        raise ConfigError(
            "--parallel fsdp shards the student over ranks, and this process was started alone; "
            "start it with torchrun --nproc-per-node GPUS, or leave --parallel out"
        )


def is_half(config: TrainConfig, device: torch.device) -> bool:
    """Check whether forwards run in bfloat16."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def blocks_of(student: nn.Module) -> list[nn.Module]:
    """Return the student's blocks: the entries of its outermost `ModuleList`s."""
    blocks: list[nn.Module] = []
    for child in student.children():
        if not isinstance(child, ParametrizationList):  # a ModuleList too
            blocks += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return blocks


def can_run_in_parallel(
    model: RadioModel, config: TrainConfig, partition: Partition, ranks: Ranks, device: torch.device
) -> bool:
    """Check whether groups can use the student in parallel: on a CPU, with a teacher cache.

    Only with our ViT, whose forward is deterministic and stateless, unlike one with batch norms, and without
    the averaged student, whose weights stand in for the student's during its forward. AdaLoss and running
    dispersions add up what a step's parts bring in the order in which they come: two losses give the same sum
    in both, summaries may not.
    """
    idle = config.cache.folder is not None and device.type == "cpu" and torch.get_num_threads() > 1
    alone = ranks.world == 1 and len(partition.groups) > 1 and not config.compile and not config.mesa
    running = config.loss.summary == "angle" and config.loss.dispersion == "running"
    most = 1 if running else 2  # parts of a step
    ordered = (running or config.balance.kind == "adaloss") and config.grad_accum_steps > most
    return idle and alone and not ordered and isinstance(model.student, ViT)


def first_weights(model: RadioModel) -> list[nn.Parameter]:
    """Return the student's weights outside its blocks; those that images meet first get gradients last."""
    student = model.student
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    inside = {id(weight) for block in blocks_of(student) for weight in block.parameters()}
    return [weight for weight in student.parameters() if id(weight) not in inside]


def _shard(module: StudentPass, device: torch.device, world: int, *, half: bool) -> None:
    """Shard every block's weights over the ranks, then the weights outside the blocks (FSDP2).

    Inputs are not cast: position crops and images need more than bfloat16, and autocast casts them where
    a kernel requires it.
    """
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")  # no view is written to
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (*blocks_of(module.student), module):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def _square(parameters: list[nn.Parameter], like: Tensor) -> Tensor:
    """Compute the squared norm of the gradients on this rank: []."""
    grads = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros_like(like)
    return torch.stack(torch._foreach_norm(grads)).square().sum()


class PreemptedError(Exception):
    """All ranks stop now."""


@final
class Preemption:
    """SIGTERM or SIGUSR1 on any rank, agreed on by all ranks. As a context manager it handles the signals.

    It may be entered again inside itself.

    The ranks' flags are reduced on the CPU during a step, so that no step waits for them: all ranks stop
    one step after the first of them got the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._channel = ranks.channel()
        self._requested = False
        self._flag: Tensor | None = None
        self._reduction: Any = None
        self._before: dict[signal.Signals, Any] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._request) for name in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            for name, handler in self._before.items():
                signal.signal(name, handler)
        if kind is None:
            self._read_flag()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the signals do what they did before, such as to end the process."""
        handlers = {name: signal.signal(name, before) for name, before in self._before.items()}
        try:
            yield
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, of which every rank has as many.

        Raises:
            PreemptedError: after an item, on all ranks, where they stop.
        """
        for item in items:
            yield item
            if self.agreed():
                raise PreemptedError

    def agreed(self) -> bool:
        """Check whether all ranks stop now; every rank calls it after every step."""
        if self._ranks.world == 1:
            return self._requested
        stop = self._read_flag()
        self._flag = torch.tensor(int(self._requested))
        self._reduction = distributed.all_reduce(
            self._flag, distributed.ReduceOp.MAX, group=self._channel, async_op=True
        )
        return stop

    def _read_flag(self) -> bool:
        if self._reduction is None or self._flag is None:
            return False
        self._reduction.wait()
        self._reduction = None
        return bool(self._flag)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
