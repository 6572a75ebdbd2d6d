"""Registry of students; a factory receives the options that recipes may set and returns a new model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from ..config import Pixels
from ..registry import Registry
from ..types import Student
from .windowed import Schedule

Tokens = Annotated[int, Interval(ge=0, le=1024)]  # besides the patches
Window = Annotated[int, Interval(ge=1, le=1024)]  # a side in tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentOptions:
    """Options of students in recipes; a family raises an error for options that it lacks."""

    class_tokens: Tokens | None = (
        None  # 1, or one per teacher; 0 = pooling (table 5); None = the architecture's
    )
    registers: Tokens | None = None  # register tokens; None = the architecture's
    stem: Literal["linear", "conv"] | None = None  # None = the architecture's
    window: Window | None = None  # window side of a vitdet student; None = the architecture's
    schedule: Schedule | None = None  # a vitdet student's global blocks: a name, or their number
    activation_checkpointing: bool = False  # activation checkpointing of every block
    upsample: bool | None = None  # add a neck of twice the resolution to a timm student; None = no
    image_size: Pixels | None = None  # side in pixels that a timm student is built for; None = its own


StudentFactory = Callable[[StudentOptions], Student]

students: Registry[StudentFactory] = Registry("student")

from . import eradio as _eradio  # noqa: E402, F401  (registers the E-RADIO family)
from . import timm as _timm  # noqa: E402, F401  (registers timm's models)
from . import vit as _vit  # noqa: E402, F401  (registers the ViT family)
