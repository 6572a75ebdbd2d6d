"""Registry of students; a factory receives the options of its family and returns a new model.

The families are imported when the registry is first read: settings and listings do not wait for torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Interval

from ..config import ReadWith, from_plain
from ..errors import ConfigError
from ..registry import Registry

if TYPE_CHECKING:
    from ..types import Student

Window = Annotated[int, Interval(ge=1, le=1024)]  # a side in tokens
NumTokens = Annotated[int, Interval(ge=0, le=1024)]  # besides the patches
NumGlobal = Annotated[int, Interval(ge=1, le=1024)]
Schedule = Literal["quarters", "runs-of-5"] | NumGlobal
"""A name, or the number of parts of the depth that each end in a global block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentOptions:
    """Options that every student has in recipes; each family adds its own in a subclass.

    Instances of this class itself are accepted by every family. Its factories annotate their parameter with
    the subclass, which gives the options their names and bounds on the command line and in files.
    """

    activation_checkpointing: bool = False  # recompute every block's activations in the backward pass

    def has(self, name: str) -> bool:
        """Check whether the family has an option of this name."""
        return name in {option.name for option in fields(self)}

    def get(self, name: str) -> Any:
        """Return the value of an option; None if it is unset or the family does not have it."""
        return getattr(self, name) if self.has(name) else None

    def change(self, **options: Any) -> Self:
        """Return a copy with other values of these options, which the family has."""
        return replace(self, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTOptions(StudentOptions):
    """Options of the ViT students; None = the architecture's own."""

    class_tokens: NumTokens | None = None  # 1, or one per teacher; 0 = pooling (table 5)
    registers: NumTokens | None = None  # register tokens
    stem: Literal["linear", "conv"] | None = None  # patch embedding
    cpe: bool = True  # positions cropped from a large table in training (CPE), or a plain ViT's (table 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTDetOptions(ViTOptions):
    """Options of the windowed ViT students; None = the architecture's own."""

    window: Window | None = None  # window side in tokens
    schedule: Schedule | None = None  # global blocks: a name, or their number


@dataclass(frozen=True, kw_only=True, slots=True)
class ERadioOptions(StudentOptions):
    """Options of the E-RADIO students."""

    window: Window | None = None  # window side in tokens of stage 4; None = chosen by the input's size


TABLE_6: tuple[str, ...] = (
    "efficientnetv2_s",
    "resnetv2_101",
    "regnety_064",
    "efficientvit_l1",
    "convnext_base",
    "dm_nfnet_f3",
    "swinv2_small_window8_256",
    "maxvit_base_tf_224",
    "poolformerv2_m36",
    "mvitv2_base",
)
"""timm's names of the paper's efficient models, in the order of table 6."""

_SIZES = (
    *("s14", "s16", "b14", "b16", "b32", "l14", "h14", "so400m14", "g14", "l16", "h16", "so400m16"),
    *("tiny12", "tiny16"),
)
_VITS = tuple(f"vit-{size}" for size in _SIZES)
_VITDETS = tuple(f"vitdet-{size}" for size in _SIZES)
_ERADIOS = tuple(
    f"e-radio-{size}{neck}" for size in ("xt", "t", "s", "b", "l", "tiny") for neck in ("", "-noup")
)
_OPTIONS: dict[str, type[StudentOptions]] = {
    **dict.fromkeys(_VITS, ViTOptions),
    **dict.fromkeys(_VITDETS, ViTDetOptions),
    **dict.fromkeys(_ERADIOS, ERadioOptions),
}

students: Registry[Callable[[Any], Student]] = Registry(
    "student",
    declared={
        "radio.students.vit": (*_VITS, *_VITDETS),
        "radio.students.eradio": _ERADIOS,
        "radio.students.timm": ("timm:", *(f"timm:{name}" for name in TABLE_6)),
    },
)


def options_type(name: str) -> type[StudentOptions]:
    """Return the options of a student's family: the annotation of its factory's first parameter.

    Raises:
        ConfigError: an unknown student, or another package's options of another kind.
    """
    if name in _OPTIONS:
        return _OPTIONS[name]
    factory: Any = students[name]
    if not callable(factory):  # another package's finished student
        return StudentOptions
    parameters = inspect.signature(factory, eval_str=True).parameters.values()
    kind = next((parameter.annotation for parameter in parameters), inspect.Parameter.empty)
    if kind is inspect.Parameter.empty:
        return StudentOptions
    if not (isinstance(kind, type) and issubclass(kind, StudentOptions)):
        raise ConfigError(
            f"{students.plugin(name) or f'student {name!r}'}: its factory takes a {kind!r:.80}; wanted a "
            f"subclass of radio.students.StudentOptions"
        )
    return kind


def resolve_options(name: str, options: StudentOptions) -> StudentOptions:
    """Convert options to those of a student's own family.

    Raises:
        ConfigError: an option that only another family has is set.
    """
    kind, common = options_type(name), options.activation_checkpointing
    if type(options) is kind:
        return options
    if options == type(options)(activation_checkpointing=common):
        return kind(activation_checkpointing=common)
    raise ConfigError(f"student {name!r} has {kind.__name__}, got {type(options).__name__}; give it its own")


def read_options(data: Any, settings: Mapping[str, Any], where: str) -> StudentOptions:
    """Read the options of the student that `settings` name; options of other families must be unset.

    Raises:
        ConfigError: as `from_plain`.
    """
    name = settings.get("student")
    if not isinstance(name, str) or name not in students:
        return StudentOptions()  # an unknown student is refused where the whole settings are checked
    kind = options_type(name)
    if isinstance(data, Mapping):  # before 0.2 the options of all families stood in every file
        own = {field.name for field in fields(kind)}
        data = {key: value for key, value in data.items() if key in own or value is not None}
    return from_plain(kind, data, where)


OptionsField = Annotated[StudentOptions, ReadWith(read_options)]
"""The type of a field `options` beside a field `student`."""
