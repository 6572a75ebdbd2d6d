"""Registry of families of frozen teachers, built from a member's name and a weights file."""

from __future__ import annotations

from collections.abc import Callable

from ..registry import Registry
from ..types import Teacher

# A family builds its member `name` with the weights in `file`: "dinov2:vitg14@FILE" is
# families["dinov2"]("vitg14", FILE). For a family that includes its weights (scenes, pip), a file is an
# error; for the others, None is. A family with an argument `meta` builds the member on the meta device where
# it is True, without reading the file.
TeacherFamily = Callable[..., Teacher]

families: Registry[TeacherFamily] = Registry("teacher")

from . import dinov2 as _dinov2  # noqa: E402, F401  (each registers its family)
from . import openclip as _openclip  # noqa: E402, F401
from . import pip as _pip  # noqa: E402, F401
from . import release as _release  # noqa: E402, F401
from . import sam as _sam  # noqa: E402, F401
from . import scenes as _scenes  # noqa: E402, F401
from . import timm as _timm  # noqa: E402, F401
