"""What one rank's pictures of one group cost, counted on the meta device: operations and bytes.

Every operator of teachers, student, adaptors and losses runs on tensors that have shapes and no values: meta
tensors that torch lets pass for a CPU's, so that autocast and fused attention are those of a real step.
`Tally` adds up torch's formulas for their operations (two a multiply-add), and follows every storage from the
operator that makes it to the moment when nothing holds it any more, forward and backward.
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
from .batches import Lesson
from .config import TrainConfig
from .partition import TeacherGroup
from .step import Distiller, Part, StudentPass, in_parts, teacher_features
from .teacher_weights import make_lean

_ATEN = torch.ops.aten
_GPUS_NAMES = {  # torch has formulas for the kernels of attention on GPUs, which take the same arguments
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}


class Cost(NamedTuple):
    """One rank's pictures of a group in one step."""

    teacher_flops: int  # none from a teacher cache
    forward_flops: int  # student, adaptors and losses
    backward_flops: int
    inputs: int  # bytes of the pictures and of the teachers' features
    teacher_working: int  # bytes beyond weights and features at the peak of the teachers' forward
    activations: int  # bytes beyond weights and inputs at the peak of the student's forward
    peak: int  # the same over forward and backward, with the gradients unless they stood before
    copies: int  # of both: weights in half precision

    @property
    def flops(self) -> int:
        """All of them."""
        return self.teacher_flops + self.forward_flops + self.backward_flops


class Outline(NamedTuple):
    """Student, adaptors and teachers of a run on the meta device."""

    model: RadioModel
    teachers: dict[str, Teacher]
    facts: dict[str, TeacherFacts]
    windows: dict[int, tuple[int, ...]]  # to draw from, at each side of the student's input
    mode: FakeTensorMode  # in which they can be called

    def of(self, *groups: TeacherGroup) -> RadioModel:
        """The model as ranks of these groups hold it: with their adaptors only."""
        held = copy.copy(self.model)
        names = [name for group in groups for name in group.teachers]
        adaptors = nn.ModuleDict({name: self.model.adaptors[name] for name in names})
        held._modules = {**self.model._modules, "adaptors": adaptors}
        return held


def outline(config: TrainConfig, *, half: bool = False) -> Outline:
    """A run's models without weights; where a family of teachers can do without, no file is read.

    Args:
        config: the run's settings.
        half: forwards run in bfloat16, so frozen matrices are kept in it.

    Raises:
        ConfigError: an unknown student or teacher, or settings that do not fit one another.
        SizeError: a resolution that a teacher or the student cannot take.
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
    # A process whose first backward is one of fake tensors could not fork others that do backwards.
    torch.ones((), requires_grad=True).exp().backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in (model, *teachers.values()):
            assert isinstance(module, nn.Module)
            module.to_empty(device="cpu")  # no memory is taken: the mode keeps the shapes alone
    return Outline(model, teachers, facts, windows, mode)


def count(config: TrainConfig, models: Outline, group: TeacherGroup, *, half: bool, standing: bool) -> Cost:
    """The cost of one rank's pictures of a group; with the largest of the windows that a step may draw.

    Args:
        config: the run's settings.
        models: from `outline`.
        group: whose teachers, and how many pictures.
        half: matrix products in bfloat16, as autocast has them on a GPU.
        standing: the gradients were there before, those of another group or part of the same step.
    """
    teachers = {name: models.teachers[name] for name in group.teachers}
    sizes = {name: models.facts[name].size for name in teachers}
    online = config.cache.folder is None
    side = max(group.side, *(max(size) for size in sizes.values()))
    with models.mode, _without_fast_paths():
        images = torch.empty(group.share, 3, side, side)
        with Tally() as taught, _autocast(half):
            targets = teacher_features(teachers, sizes, images)
        features = sum(_size(known.summary) + _size(known.tokens) for known in targets.values())
        lesson = Lesson(group, images, targets)
        first = in_parts(lesson, None, config.accumulate)[0]
        passed = _learn(config, models, first.lesson, half=half, standing=standing)
    return Cost(
        teacher_flops=taught.flops if online else 0,
        forward_flops=passed.forward * config.accumulate,
        backward_flops=passed.backward * config.accumulate,
        inputs=_size(images) + features,
        teacher_working=taught.peak - features if online else 0,
        activations=passed.activations,
        peak=passed.peak,
        copies=_half_copies(models.of(group)) if half else 0,
    )


def bytes_of(module: Any) -> int:
    """Bytes of a module's parameters and buffers."""
    assert isinstance(module, nn.Module)
    return sum(_size(tensor) for tensor in (*module.parameters(), *module.buffers()))


class Tally(TorchDispatchMode):
    """Operations, and bytes that they made and something still holds, now and at their peak.

    What stood before, such as weights and inputs, is not counted. Torch's own `FlopCounterMode` counts the
    same operations, but keeps the graphs of recomputed blocks alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.now = self.peak = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operator's result, its operations added and its new storages entered."""
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


def _learn(config: TrainConfig, models: Outline, lesson: Lesson, *, half: bool, standing: bool) -> _Passed:
    model = models.of(lesson.group)
    assert isinstance(model.student, nn.Module)
    asked = [teacher for teacher in config.teachers if teacher.name in lesson.group.teachers]
    balancer = make_balancer(config.balance, asked, model.summary_dim)
    distiller = Distiller(model, asked, config.loss, balancer)
    drawn = model.draw(len(lesson.images), torch.Generator())
    window = max(models.windows[lesson.group.side], default=None)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if standing else None
    with Tally() as tally:
        with _autocast(half):
            losses = distiller(StudentPass(model.student), Part(lesson, drawn), window, False)
        forward, activations = tally.flops, tally.peak
        losses.total.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return _Passed(forward, tally.flops - forward, activations, tally.peak)


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Torch's attention modules take kernels of their own in inference, which the counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _autocast(half: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def _half_copies(model: nn.Module) -> int:
    """Bytes of the matrices and kernels that autocast keeps in half precision until the backward is done."""
    return sum(2 * parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
