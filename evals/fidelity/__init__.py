"""How closely a student's adaptors reproduce its teachers' features: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Scenes, late
from radio.config import check
from radio.datasets import DataSets
from radio.errors import ConfigError

_MAX_SIDE = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelitySettings:
    """How much of its teachers' features a student reproduces, on images without labels."""

    images: str | None = None
    """Images that it was not trained on: a folder with one folder per class, or tar shards; labels are not
    read. Default: the generated world."""
    num_images: Scenes = 500
    """Number of images, spread evenly."""
    teachers: tuple[str, ...] = ()
    """NAME=MODEL: compare the adaptor NAME with this model, whether the student learned from it or not, such
    as clip=scenes:clip. Default: every teacher in the checkpoint's metadata, whose weights have to be the
    same."""

    sides: tuple[str, ...] = ()
    """NAME=SIDE: the side in pixels at which the student sees the images for the adaptor NAME; of several
    sides for one, each is compared (clip=224 clip=432: `unexplained_clip_224px`). Default: that of its
    training, the largest of several."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid."""
        check(self)
        _check_pairs("--teachers", self.teachers, "MODEL", "clip=scenes:clip")
        names = [text.partition("=")[0] for text in self.teachers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"--teachers names {twice[0]} twice; give each adaptor one model")
        _check_pairs("--sides", self.sides, "SIDE", "clip=224")
        for text in self.sides:
            side = text.partition("=")[2]
            if not (side.isdecimal() and 1 <= int(side) <= _MAX_SIDE):
                raise ConfigError(f"--sides {text}: wanted NAME=SIDE, a side of 1 to {_MAX_SIDE} pixels")
        for name, sides in self.sides_of.items():
            if len(set(sides)) < len(sides):
                raise ConfigError(f"--sides names a side of {name} twice; give each once")

    @property
    def model_of(self) -> dict[str, str]:
        """The models to compare with, as specs, by the adaptor's name."""
        return {name: model for name, _, model in (text.partition("=") for text in self.teachers)}

    @property
    def sides_of(self) -> dict[str, list[int]]:
        """The sides of the student's input in pixels, by the adaptor's name."""
        sides: dict[str, list[int]] = {}
        for name, _, side in (text.partition("=") for text in self.sides):
            sides.setdefault(name, []).append(int(side))
        return sides


def _check_pairs(option: str, texts: tuple[str, ...], kind: str, example: str) -> None:
    """Check that texts are NAME=VALUE."""
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} {text}: wanted NAME={kind}, such as {example}")


def data_sets(settings: FidelitySettings, sets: DataSets) -> Mapping[str, FidelitySettings]:
    """Compare on ImageNet's validation images, unless images are named."""
    if settings.images is not None:
        return {OWN: settings}
    return {} if sets.imagenet is None else {"imagenet": replace(settings, images=str(sets.imagenet / "val"))}


@evaluators.register("fidelity")
def make() -> Evaluator[FidelitySettings]:
    """Teachers' features reproduced by a student: unexplained variance, CKA, and the summaries' angles."""
    return Evaluator(
        name="fidelity",
        settings=FidelitySettings,
        evaluate=late("evals.fidelity.evaluator:evaluate"),
        title="fidelity to the teachers",
        missing_requirements=late("evals.fidelity.evaluator:missing_requirements"),
        data_sets=data_sets,
    )
