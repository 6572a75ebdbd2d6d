"""RadioModel: a student and its adaptors, small heads into teachers' spaces (§3.3); saving and loading."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import torch
from annotated_types import Interval
from torch import Tensor, nn

from . import checkpoint
from .config import from_plain, to_plain
from .errors import CheckpointError, ConfigError, RadioError, shown
from .foreign import check_encoder, watch_features
from .nn.vit import NORM_EPS
from .ops import resize_features
from .students import OptionsField, StudentOptions, resolve_options, students
from .types import AdaptingModel, Adaptor, Features, Resampling, Student

# Letters: B batch, C summary width, T tokens, D token width, H W grid.

Width = Annotated[int, Interval(ge=1, le=2**20)]  # of a feature vector
Slot = Annotated[int, Interval(ge=0, lt=1024)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorConfig:
    """The shape of the adaptor for one teacher."""

    name: str
    summary_dim: Width  # the teacher's C
    token_dim: Width  # the teacher's D
    hidden: Width | None = None  # hidden width of both heads; None = the student's token width
    slot: Slot | None = None  # class token it reads if each teacher has one; None = the whole summary
    resample: Literal["before", "after"] = (
        "before"  # or after the head; bilinear to the teacher's grid (our choice)
    )


class Head(nn.Module):
    """Linear, LayerNorm, GELU, Linear."""

    LAST = "layers.3"  # the layer whose output it returns

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden, eps=NORM_EPS), nn.GELU(), nn.Linear(hidden, out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., out]."""
        y: Tensor = self.layers(x)
        return y


class MLPAdaptor(nn.Module):
    """One head for the summary and one for the tokens.

    Args:
        config: the teacher's widths and how to resample.
        summary_dim: C of the student.
        token_dim: D of the student.

    Raises:
        ConfigError: the summary has no class token at that slot.
    """

    def __init__(self, config: AdaptorConfig, summary_dim: int, token_dim: int) -> None:
        super().__init__()
        slots = summary_dim // token_dim
        if config.slot is not None and not 0 <= config.slot < slots:
            raise ConfigError(
                f"adaptor {config.name!r} reads class token {config.slot}, and the student has {slots}; "
                f"give the student one per teacher and count from 0"
            )
        self.config = config
        self.slot_width = token_dim
        hidden = config.hidden or token_dim
        self.summary = Head(summary_dim if config.slot is None else token_dim, hidden, config.summary_dim)
        self.spatial = Head(token_dim, hidden, config.token_dim)

    def forward(self, features: Features, grid: Resampling | None = None) -> Features:
        """Map features to the teacher's widths; resample tokens to `grid` (None keeps the student's)."""
        to, before = features.grid if grid is None else grid, self.config.resample == "before"
        placed = resize_features(features, to) if before else features
        mapped = Features(self.adapt_summary(features.summary), self.spatial(placed.tokens), placed.grid)
        return mapped if before else resize_features(mapped, to)

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        """Map the student's summaries [B, C] to the teacher's [B, C]."""
        if self.config.slot is not None:
            start = self.config.slot * self.slot_width
            summaries = summaries[:, start : start + self.slot_width]
        carried: Tensor = self.summary(summaries)
        return carried


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything needed to build a RadioModel, except its weights."""

    student: str
    options: OptionsField = field(default_factory=StudentOptions)
    adaptors: tuple[AdaptorConfig, ...] = ()


class RadioModel(AdaptingModel, nn.Module):
    """A student and its adaptors; evaluators use it like any other backbone.

    `model(images)` returns the student's own features, `model.adapt("clip", features)` maps them into a
    teacher's space. `metadata` holds the checkpoint's entries about teachers, data and settings.

    Raises:
        ConfigError: an unknown student, or two adaptors that cannot be combined.
    """

    adaptors: Mapping[str, Adaptor]
    text = weights_file = sam = None

    def __init__(
        self, config: ModelConfig, metadata: Mapping[str, Any] | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        self.config = replace(config, options=resolve_options(config.student, config.options))
        self.metadata = dict(metadata or {})
        self.name = name or config.student
        self.student = student = make_student(config.student, self.config.options)
        self.fixed_size, self.patch_size = student.fixed_size, student.patch_size
        self.summary_dim, self.token_dim = student.summary_dim, student.token_dim  # C and D of the student
        self.summary_tokens = student.summary_tokens
        self.adaptors = cast("Mapping[str, Adaptor]", _heads(config.adaptors, student))

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, the student's fingerprint (which covers its window) and adaptors' shapes."""
        shape = json.dumps(to_plain(self.config.adaptors), sort_keys=True)
        return checkpoint.digest(
            self.get_submodule("adaptors").state_dict(), self.student.fingerprint + shape
        )

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels: the training resolution, else the architecture's native size."""
        trained = self.metadata.get("resolution")
        return self.nearest_size(trained, trained) if isinstance(trained, int) else self.student.native_size

    @property
    def window(self) -> int | None:
        """Side in tokens of the student's attention windows."""
        return self.student.window

    @property
    def num_blocks(self) -> int:
        """Number of the student's blocks whose outputs `intermediate` can return."""
        return self.student.num_blocks

    @property
    def intermediate(self) -> Callable[[Tensor, Sequence[int]], list[Features]] | None:
        """The student's method that computes the features after given blocks; None without one."""
        return self.student.intermediate

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest (height, width) that the student accepts."""
        return self.student.nearest_size(height, width)

    @property
    def with_window(self) -> Callable[[int | None], Self] | None:
        """Method that returns this model with windows of another side; None for a student without windows."""
        return None if self.student.with_window is None else self._with_window

    def _with_window(self, side: int | None) -> Self:
        assert self.student.with_window is not None
        twin = copy.copy(self)
        twin._modules = {**self._modules, "student": self.student.with_window(side)}  # type: ignore[dict-item]
        return twin

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Draw the random values of one training forward of the student; None if it draws nothing.

        Raises:
            ConfigError: the student returns something other than None or a tensor with a row for each image.
        """
        crops: Any = self.student.sample_crops(batch, generator)
        if crops is None or (isinstance(crops, Tensor) and crops.ndim and len(crops) == batch):
            return crops
        raise ConfigError(
            f"student {self.config.student!r}: its sample_crops gave a {type(crops).__name__}; wanted None, "
            f"or a tensor with a row for each of {batch} images"
        )

    def forward(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Compute the student's own features of [B, 3, h, w] RGB in [0, 1].

        Raises:
            SizeError: a size that the student does not accept; names the nearest that it does.
        """
        return self.student(images, crops)

    def save(self, path: Path, tensors: Mapping[str, Tensor] | None = None) -> str:
        """Write weights and metadata as `.pt` or `.safetensors`, atomically; return the file's sha256.

        `tensors`: weights of this architecture to write instead of the module's own, such as those gathered
        from ranks or averaged.
        """
        weights = self.state_dict() if tensors is None else tensors
        return checkpoint.save(path, weights, {**self.metadata, "model": to_plain(self.config)})


def make_student(name: str, options: StudentOptions) -> Student:
    """Build the student that is registered under a name, and check that it has every part of one.

    Raises:
        ConfigError: an unknown name, options of another family, or another package's object that is no
            torch module, or lacks a part of `radio.types.Student`.
    """
    factory: Any = students[name]  # another package's factory may be any object
    student = factory(resolve_options(name, options)) if callable(factory) else factory
    plugin = students.plugin(name)
    check_encoder(str(plugin or f"student {name!r}"), student, kind="Student", part="sample_crops")
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
    config: ModelConfig, seed: int, metadata: Mapping[str, Any] | None = None, name: str | None = None
) -> RadioModel:
    """Build a model with fresh weights drawn from `seed`; torch's global generator is left unchanged."""
    with seeded(seed):
        return RadioModel(config, metadata, name)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block; restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too, for good
        yield


def build_meta(config: ModelConfig) -> RadioModel:
    """Build the model on the meta device: every shape, without memory.

    Raises:
        ConfigError: an unknown student, or options or adaptors that it does not support.
    """
    with torch.device("meta"):
        return RadioModel(config)


def load(path: Path) -> RadioModel:
    """Load the model in a checkpoint file, in inference mode on the CPU.

    Raises:
        CheckpointError: no such file, or one that is foreign, truncated, altered, not a model, or has
            weights that are not finite.
    """
    stored = checkpoint.load(path)
    config = _read_config(stored, path)
    loaded = build(config, 0, stored.metadata, _label(path))
    checkpoint.load_state(loaded, stored.tensors, str(path))
    return loaded.eval()


def load_untrained(path: Path, seed: int) -> RadioModel:
    """Build a checkpoint's architecture with fresh weights, as the untrained baseline.

    Its metadata keeps the teachers, so that it is evaluated with the same decoders and text towers as the
    trained model.
    """
    stored = checkpoint.load(path)
    config = _read_config(stored, path)
    metadata: dict[str, Any] = {
        key: stored.metadata[key] for key in ("resolution", "teachers") if key in stored.metadata
    }
    return build(config, seed, metadata, f"{_label(path)}-untrained").eval()


def _read_config(stored: checkpoint.Checkpoint, path: Path) -> ModelConfig:
    """Read the model's configuration; check that the file's weights fit it before anything is built."""
    where = shown(path)
    if "model" not in stored.metadata:
        raise CheckpointError(f"{where}: its metadata describes no model; it holds something else")
    config = from_plain(ModelConfig, stored.metadata["model"], f"{where}: model")
    if len(config.adaptors) > len(stored.tensors):
        raise CheckpointError(
            f"{where}: its metadata names {len(config.adaptors)} adaptors, and the file has "
            f"{len(stored.tensors)} tensors; it was altered"
        )
    try:
        shape = build_meta(config)
    except RadioError:
        raise
    except Exception:  # noqa: BLE001 (another package's student that cannot be built on the meta device)
        return config  # its weights are then compared after it is built
    checkpoint.check_state(shape, stored.tensors, where)
    return config


def _label(path: Path) -> str:
    return path.parent.name if path.stem == "ckpt" and path.parent.name else path.stem
