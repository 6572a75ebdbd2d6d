"""Students by name. A factory takes the options that recipes may set and returns a fresh model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from ..config import Pixels
from ..registry import Registry
from ..types import Student
from .windowed import Schedule

Tokens = Annotated[int, Interval(ge=0, le=1024)]  # beside the patches
Window = Annotated[int, Interval(ge=1, le=1024)]  # a side in tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentOptions:
    """What a recipe may choose about any student; an option that a family lacks is an error there."""

    class_tokens: Tokens | None = None  # 1, or one per teacher; 0 = pooling (table 5); None = the name's own
    registers: Tokens | None = None  # register tokens; None = the name's own
    stem: Literal["linear", "conv"] | None = None  # None = the name's own
    window: Window | None = None  # window side of a vitdet student; None = the name's own
    schedule: Schedule | None = None  # a vitdet student's global blocks: a name, or how many
    recompute: bool = False  # activation checkpointing of every block
    upsample: bool | None = None  # a timm student's neck of twice the resolution; None = without
    image_size: Pixels | None = None  # the side in pixels a timm student is built for; None = the name's own


StudentFactory = Callable[[StudentOptions], Student]

students: Registry[StudentFactory] = Registry("student")

from . import eradio as _eradio  # noqa: E402, F401  (enters the E-RADIO family)
from . import timm as _timm  # noqa: E402, F401  (enters timm's models)
from . import vit as _vit  # noqa: E402, F401  (enters the ViT family)
