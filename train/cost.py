"""Cost of one rank's images of one group in operations and bytes, counted on the meta device.

Every operator of teachers, student, adaptors and losses runs on fake tensors: they have shapes but no values,
and pass as CPU tensors, so that autocast and fused attention are those of a real step. `CostCounter` adds up
torch's formulas for the operations (two per multiply-add), and tracks every storage from its allocation until
nothing references it any more, in forward and backward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from radio.hub import outline_teacher
from radio.model import RadioModel
from radio.types import Teacher

from .assembly import (
    TeacherFacts,
    check_student,
    model_config,
    student_resolutions,
    teacher_sizes,
    window_candidates,
)
from .balancing import make_balancer
from .batches import GroupBatch
from .config import TrainConfig
from .partition import TeacherGroup
from .step import DistillationLoss, Part, StudentPass, in_parts, teacher_features
from .teacher_weights import make_lean

_ATEN = torch.ops.aten
_GPUS_NAMES = {  # torch has formulas for the GPU attention kernels, which take the same arguments
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}


class Cost(NamedTuple):
    """Cost of one rank's images of a group in one step."""

    teacher_flops: int  # 0 with a teacher cache
    forward_flops: int  # student, adaptors and losses
    backward_flops: int
    inputs: int  # bytes of the images and of the teachers' features
    teacher_working: int  # bytes beyond weights and features at the peak of the teachers' forward
    activations: int  # bytes beyond weights and inputs at the peak of the student's forward
    peak: int  # over forward and backward, gradients included unless allocated before
    copies: int  # bytes in both peaks: weights in half precision

    @property
    def flops(self) -> int:
        """All operations."""
        return self.teacher_flops + self.forward_flops + self.backward_flops


class Outline(NamedTuple):
    """Student, adaptors and teachers of a run on the meta device."""

    model: RadioModel
    teachers: dict[str, Teacher]
    facts: dict[str, TeacherFacts]
    windows: dict[int, tuple[int, ...]]  # to sample from, per side of the student's input
    mode: FakeTensorMode  # mode in which they can be called

    def of(self, *groups: TeacherGroup) -> RadioModel:
        """Copy the model with the adaptors of these groups only, as their ranks hold it."""
        held = copy.copy(self.model)
        names = [name for group in groups for name in group.teachers]
        adaptors = nn.ModuleDict({name: self.model.adaptors[name] for name in names})
        held._modules = {**self.model._modules, "adaptors": adaptors}
        return held


def outline(config: TrainConfig, *, half: bool = False) -> Outline:
    """Build a run's models without weights; no file is read where the teacher's family permits it.

    Args:
        config: the run's settings.
        half: forwards run in bfloat16, so frozen matrices are stored in it.

    Raises:
        ConfigError: the student or a teacher is unknown, or settings contradict each other.
        SizeError: a teacher or the student cannot take its resolution.
    """
    teachers = {t.name: outline_teacher(t.model) for t in config.teachers}
    for teacher in teachers.values():
        make_lean(teacher, config, half=half)
    sizes = teacher_sizes(config, teachers)
    facts = {
        name: TeacherFacts("", sizes[name], teacher.summary_dim, teacher.token_dim)
        for name, teacher in teachers.items()
    }
    with torch.device("meta"):
        model = RadioModel(model_config(config, facts)).train()
    beside = student_resolutions(config)
    windows = window_candidates(model, config, beside)
    check_student(model.student, beside, windows)
    # If a process's first backward is on fake tensors, processes forked from it cannot run a backward.
    torch.ones((), requires_grad=True).exp().backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in (model, *teachers.values()):
            assert isinstance(module, nn.Module)
            module.to_empty(device="cpu")  # allocates nothing: the mode keeps only shapes
    return Outline(model, teachers, facts, windows, mode)


def count(config: TrainConfig, models: Outline, group: TeacherGroup, *, half: bool, standing: bool) -> Cost:
    """Count the cost of one rank's images of a group, with the largest window that a step may draw.

    Args:
        config: the run's settings.
        models: from `outline`.
        group: gives the teachers and the number of images.
        half: run matrix products in bfloat16, as autocast does on a GPU.
        standing: gradients are already allocated, by another group or part of the same step.
    """
    teachers = {name: models.teachers[name] for name in group.teachers}
    sizes = {name: models.facts[name].size for name in teachers}
    online = config.cache.folder is None
    side = max(group.side, *(max(size) for size in sizes.values()))
    with models.mode, _without_fast_paths():
        images = torch.empty(group.share, 3, side, side)
        with CostCounter() as taught, _autocast(half):
            targets = teacher_features(teachers, sizes, images)
        features = sum(_size(known.summary) + _size(known.tokens) for known in targets.values())
        lesson = GroupBatch(group, images, targets)
        first = in_parts(lesson, None, config.grad_accum_steps)[0]
        passed = _learn(config, models, first.lesson, half=half, standing=standing)
    return Cost(
        teacher_flops=taught.flops if online else 0,
        forward_flops=passed.forward * config.grad_accum_steps,
        backward_flops=passed.backward * config.grad_accum_steps,
        inputs=_size(images) + features,
        teacher_working=taught.peak - features if online else 0,
        activations=passed.activations,
        peak=passed.peak,
        copies=_half_copies(models.of(group)) if half else 0,
    )


def bytes_of(module: Any) -> int:
    """Return the bytes of a module's parameters and buffers."""
    assert isinstance(module, nn.Module)
    return sum(_size(tensor) for tensor in (*module.parameters(), *module.buffers()))


class CostCounter(TorchDispatchMode):
    """Counts operations, and the bytes that they allocated: currently referenced, and at the peak.

    Tensors from before, such as weights and inputs, are not counted. Torch's `FlopCounterMode` counts the
    same operations, but keeps the graphs of checkpointed blocks alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.now = self.peak = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; add its operations and track its new storages."""
        named = kwargs or {}
        self._enter((args, named), counted=False)
        out = func(*args, **named)
        self._enter(out, counted=True)
        packet = func.overloadpacket
        if (formula := flop_registry.get(_GPUS_NAMES.get(packet, packet))) is not None:
            self.flops += int(formula(*args, **named, out_val=out))
        return out

    def _enter(self, tensors: Any, *, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage(), counted=counted)

    def _hold(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._held:
            return

        def leave(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, leave)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Passed(NamedTuple):
    forward: int  # operations
    backward: int
    activations: int  # bytes at the forward's peak
    peak: int


def _learn(
    config: TrainConfig, models: Outline, lesson: GroupBatch, *, half: bool, standing: bool
) -> _Passed:
    model = models.of(lesson.group)
    assert isinstance(model.student, nn.Module)
    asked = [teacher for teacher in config.teachers if teacher.name in lesson.group.teachers]
    balancer = make_balancer(config.balance, asked, model.summary_dim)
    distiller = DistillationLoss(model, asked, config.loss, balancer)
    crops = model.sample_crops(len(lesson.images), torch.Generator())
    window = max(models.windows[lesson.group.side], default=None)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if standing else None
    with CostCounter() as tally:
        with _autocast(half):
            losses = distiller(StudentPass(model.student), Part(lesson, crops), window, False)
        forward, activations = tally.flops, tally.peak
        losses.total.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return _Passed(forward, tally.flops - forward, activations, tally.peak)


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Disable torch's fused attention kernels for inference, which the counter has no formulas for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _autocast(half: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def _half_copies(model: nn.Module) -> int:
    """Return the bytes of the half-precision weights that autocast caches until the backward ends."""
    return sum(2 * parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
