"""Registry of families of frozen teachers, built from a member's name and a weights file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from ..types import Teacher

# A family builds its member `name` with the weights in `file`: "dinov2:vitg14@FILE" is
# families["dinov2"]("vitg14", FILE). For a family that includes its weights (scenes, pip), a file is an
# error; for the others, None is. A family with an argument `meta` builds the member on the meta device where
# it is True, without reading the file.
TeacherFamily = Callable[..., "Teacher"]

_MODULES = {"radio": "release"}  # other families are in modules of their own names
_NAMES = ("dinov2", "hf", "openclip", "pip", "radio", "sam", "scenes", "timm")

families: Registry[TeacherFamily] = Registry(
    "teacher", declared={f"radio.teachers.{_MODULES.get(name, name)}": [name] for name in _NAMES}
)
