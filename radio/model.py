"""RadioModel: one student with its adaptors, and the file it is saved as."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from . import checkpoint
from .adaptors import AdaptorConfig, MLPAdaptor
from .config import from_plain, to_plain
from .errors import CheckpointError, ConfigError, RadioError, SizeError, did_you_mean, shown
from .foreign import check_sizes, watch_features
from .students import StudentOptions, students
from .types import Adaptor, Features, Student, Windowed

# Letters: B batch.

_STUDENT = ("name", "fingerprint", "native_size", "summary_dim", "token_dim", "fit", "draw")  # its parts


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """All that is needed to build a RadioModel without its weights."""

    student: str
    options: StudentOptions = field(default_factory=StudentOptions)
    adaptors: tuple[AdaptorConfig, ...] = ()


class RadioModel(nn.Module):
    """A student and its adaptors; to every evaluator a backbone like any other.

    `model(images)` gives the student's own features, `model.adapt("clip", features)` carries them
    into a teacher's space. `card` is what the checkpoint says of teachers, data and settings.

    Raises:
        ConfigError: an unknown student, or adaptors that cannot stand side by side.
    """

    def __init__(
        self, config: ModelConfig, card: Mapping[str, Any] | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.card = dict(card or {})
        self.label = name or config.student
        factory: Any = students[config.student]  # another package's may be anything
        student = factory(config.options) if callable(factory) else factory
        self.student = as_student(config.student, student)
        self.adaptors = _heads(config.adaptors, self.student)

    @property
    def name(self) -> str:
        """The checkpoint's or the student's name."""
        return self.label

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, of the student's own fingerprint (its window counts), and of the shape."""
        shape = json.dumps(to_plain(self.config.adaptors), sort_keys=True)
        return checkpoint.digest(self.adaptors.state_dict(), self.student.fingerprint + shape)

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels: what it was trained at, else what its architecture was made for."""
        trained = self.card.get("resolution")
        return self.fit(trained, trained) if isinstance(trained, int) else self.student.native_size

    @property
    def summary_dim(self) -> int:
        """C of the student's own summary."""
        return self.student.summary_dim

    @property
    def token_dim(self) -> int:
        """D of the student's own tokens."""
        return self.student.token_dim

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) that the student takes."""
        return self.student.fit(height, width)

    def with_window(self, side: int | None) -> Self:
        """The same model with another attention window (None: the student's own way), sharing the weights.

        Raises:
            SizeError: a window for a student without windows.
        """
        if not isinstance(self.student, Windowed):
            if side is None:
                return self
            raise SizeError(f"{self.name} has no attention windows to choose; use a vitdet student")
        twin = copy.copy(self)
        twin._modules = {**self._modules, "student": self.student.with_window(side)}  # type: ignore[dict-item]
        return twin

    def draw(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """What one training forward of the student draws at random.

        Raises:
            ConfigError: it draws something else than a tensor with a row for each picture.
        """
        drawn: Any = self.student.draw(batch, generator)
        if drawn is None or (isinstance(drawn, Tensor) and drawn.ndim and len(drawn) == batch):
            return drawn
        raise ConfigError(
            f"student {self.config.student!r}: its draw gave a {type(drawn).__name__}; wanted None, or a "
            f"tensor with a row for each of {batch} pictures"
        )

    def forward(self, images: Tensor, drawn: Tensor | None = None) -> Features:
        """The student's own features of [B, 3, h, w] RGB in [0, 1].

        Raises:
            SizeError: a size that the student cannot take; names the nearest that it can.
        """
        return self.student(images, drawn)

    def adapt(self, name: str, features: Features, grid: tuple[int, int] | None = None) -> Features:
        """Features carried into teacher `name`'s space, on `grid` (None keeps the student's).

        Raises:
            ConfigError: there is no adaptor of that name; lists those there are.
        """
        return self._adaptor(name)(features, grid)

    def adapt_summary(self, name: str, summaries: Tensor) -> Tensor:
        """The student's summaries [B, C] alone in teacher `name`'s space, for summaries kept from earlier.

        Raises:
            ConfigError: as `adapt`.
        """
        return self._adaptor(name).carry_summary(summaries)

    def _adaptor(self, name: str) -> Adaptor:
        if name not in self.adaptors:
            hint = did_you_mean(name, self.adaptors) or f"; it has {', '.join(self.adaptors) or 'none'}"
            raise ConfigError(f"{self.name} has no adaptor {name!r}{hint}")
        adaptor = self.adaptors[name]
        assert isinstance(adaptor, MLPAdaptor)  # as _heads makes them
        return adaptor

    def save(self, path: Path, tensors: Mapping[str, Tensor] | None = None) -> str:
        """Write weights and card as `.pt` or `.safetensors`, atomically; the file's sha256.

        `tensors` are other weights of this architecture to write instead: gathered from ranks, or averaged.
        """
        weights = self.state_dict() if tensors is None else tensors
        return checkpoint.save(path, weights, {**self.card, "model": to_plain(self.config)})


def as_student(name: str, student: Any) -> Student:
    """The student, once it is seen to have all that one needs.

    Raises:
        ConfigError: it is no torch module, or lacks a part of `radio.types.Student`.
    """
    if not isinstance(student, nn.Module):
        raise ConfigError(f"student {name!r} is not a torch module; make its factory return one")
    # The class first: isinstance would make every property, and a fingerprint hashes all weights.
    lacking = [part for part in _STUDENT if not hasattr(type(student), part) and not hasattr(student, part)]
    if lacking:
        raise ConfigError(
            f"student {name!r} has no {', no '.join(lacking)}; make it a whole radio.types.Student"
        )
    plugin = students.plugin(name)
    check_sizes(str(plugin or f"student {name!r}"), student)
    if plugin is not None:
        watch_features(str(plugin), student)
    return cast(Student, student)


def _heads(configs: tuple[AdaptorConfig, ...], student: Student) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for config in configs:
        if config.name in heads:
            raise ConfigError(f"two adaptors are named {config.name!r}; give every teacher a name of its own")
        try:
            heads[config.name] = MLPAdaptor(config, student.summary_dim, student.token_dim)
        except KeyError as error:  # a dot, or a word such as "keys" that torch's ModuleDict needs itself
            raise ConfigError(f"an adaptor cannot be named {config.name!r}; choose another name") from error
    return heads


def build(
    config: ModelConfig, seed: int, card: Mapping[str, Any] | None = None, name: str | None = None
) -> RadioModel:
    """A fresh model whose weights `seed` decides; torch's global generator is left as it was."""
    with seeded(seed):
        return RadioModel(config, card, name)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw inside from torch's CPU generator, seeded so; afterwards every generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too, for good
        yield


def outline(config: ModelConfig) -> RadioModel:
    """The model on the meta device: every shape, and memory for none.

    Raises:
        ConfigError: an unknown student, or options or adaptors that it cannot have.
    """
    with torch.device("meta"):
        return RadioModel(config)


def load(path: Path) -> RadioModel:
    """The model in a checkpoint file, in inference mode on the CPU.

    Raises:
        CheckpointError: no such file, or one that is foreign, truncated, altered, or not a model; or whose
            weights are not finite.
    """
    found = checkpoint.load(path)
    config = _read_config(found, path)
    loaded = build(config, 0, found.card, _label(path))
    checkpoint.load_state(loaded, found.tensors, str(path))
    return loaded.eval()


def load_untrained(path: Path, seed: int) -> RadioModel:
    """The architecture of a checkpoint with fresh weights: the floor that training rose from.

    Its card keeps the teachers, whose decoders and text towers it is scored with like the trained one.
    """
    found = checkpoint.load(path)
    config = _read_config(found, path)
    card: dict[str, Any] = {key: found.card[key] for key in ("resolution", "teachers") if key in found.card}
    return build(config, seed, card, f"{_label(path)}-untrained").eval()


def _read_config(found: checkpoint.Checkpoint, path: Path) -> ModelConfig:
    """The model that a card describes, once the file is seen to hold its weights: no other is ever built."""
    where = shown(path)
    if "model" not in found.card:
        raise CheckpointError(f"{where}: its card describes no model; it holds something else")
    config = from_plain(ModelConfig, found.card["model"], f"{where}: model")
    if len(config.adaptors) > len(found.tensors):
        raise CheckpointError(
            f"{where}: its card names {len(config.adaptors)} adaptors, and the file has {len(found.tensors)} "
            f"tensors; it was altered"
        )
    try:
        shape = outline(config)
    except RadioError:
        raise
    except Exception:  # noqa: BLE001 (another package's student, which the meta device is too little for)
        return config  # then its weights are compared after it is built
    checkpoint.check_state(shape, found.tensors, where)
    return config


def _label(path: Path) -> str:
    return path.parent.name if path.stem == "ckpt" and path.parent.name else path.stem
