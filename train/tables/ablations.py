"""Every ingredient of the recipes after AM-RADIO by itself, all of them, and all but one, in small.

Nobody has published these ablations of C-RADIOv4: what each ingredient claims is from the papers' texts. All
rows share one recipe, whose settings were fixed before the first row was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from evals.fidelity import FidelitySettings
from evals.knn import KnnSettings
from evals.resolution import ResolutionSettings
from evals.zeroshot import ZeroshotSettings

from ..config import SidesConfig, TrainConfig
from ..recipes import SCENES_TEACHERS, at_high
from .layout import SIDES, SPREADS, Claim, Line, Runs, TableLayout
from .small import SEEDS, small_base

FIDELITY = FidelitySettings(num_images=600)
BASE_SIDES = ("clip=96", "dense=96", "sam=168")
RESOLUTION = ResolutionSettings(
    sides=SIDES, knn=KnnSettings(scenes=(600, 300)), zeroshot=ZeroshotSettings(scenes=300)
)
"""Settings of tasks in tables of claims, of some seconds a row (ours); k-NN and zero-shot have their own."""

MEASURED_STEPS = 20  # steps whose images teachers are measured on (ours): 480 images, 31,000 tokens of CLIP
_OPPOSITE: Mapping[Claim, Claim] = {"higher": "lower", "lower": "higher", "": ""}
_COMPARED: Mapping[str, Claim] = dict.fromkeys(("unexplained", "knn", "zeroshot"), "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingredient:
    """One change of the recipe, and what its authors claim of it."""

    name: str  # of its runs: `phi-s`, `no-phi-s`
    title: str
    change: Callable[[TrainConfig], TrainConfig]
    source: str  # where it is from, and what is claimed there
    claims: Mapping[str, Claim] = field(default_factory=dict)  # by column, of the recipe with it
    # What the recipe without it has in its place, where the ingredient changes more than what it is about.
    control: Callable[[TrainConfig], TrainConfig] | None = None
    control_title: str = ""


def _phi_s(base: TrainConfig) -> TrainConfig:
    return replace(base, normalise=replace(base.normalise, kind="phi-s", steps=MEASURED_STEPS))


def _angle(base: TrainConfig) -> TrainConfig:
    loss = replace(base.loss, summary="angle")
    return replace(base, loss=loss, normalise=replace(base.normalise, steps=MEASURED_STEPS))


def _sides(base: TrainConfig) -> TrainConfig:
    """Show the student small images at several sides, and each teacher's view of large ones too."""
    high = at_high(base.teachers[:2], SidesConfig(sides=(HIGH_SIDE,)), HIGH_BATCH)
    return replace(base, teachers=(*base.teachers, *high), resolutions=SidesConfig(sides=LOW_SIDES))


def _mosaic(base: TrainConfig) -> TrainConfig:
    """Let SAM's part teach the small images too, four of them in one input."""
    sam = base.teachers[2]
    low = replace(
        sam,
        name=f"{sam.name}-low",
        adaptor=sam.name,
        student_resolution=None,
        batch_size=None,
        mosaic=True,
        resolution=TILE,
    )
    return replace(base, teachers=(*base.teachers, low))


def _shift(base: TrainConfig) -> TrainConfig:
    return replace(base, loss=replace(base.loss, shift=SHIFT))


def smaller_crops(base: TrainConfig) -> TrainConfig:
    """Show models as much of an image as frames that are shifted in it do."""
    low, high = base.data.crop_scale
    return replace(base, data=replace(base.data, crop_scale=(low * FRAME_AREA, high * FRAME_AREA)))


def _mesa(base: TrainConfig) -> TrainConfig:
    return replace(base, ema=EMA, mesa=1.0)


def _lamb(base: TrainConfig) -> TrainConfig:
    return replace(base, optim=replace(base.optim, kind="lamb", lr=LAMB_LR))


LOW_SIDES = (72, 96, 144)
"""Sides of the small images in pixels, drawn equally often (ours)."""
HIGH_SIDE, HIGH_BATCH = 168, 4
"""Side and number of the large images: SAM's in the base, so that all see the same ones."""
TILE = 56
"""Side of a mosaic's tile in pixels: 2 x 2 of them in 112, 7 x 7 tokens where the student has 8 x 8."""
SHIFT = 0.5
"""Deviation of the shifts in patches: C-RADIOv4's."""
FRAME_AREA = (8 / 12) ** 2
"""Share of the canvas that a shifted frame shows, for shifts of up to 2 of CLIP's 8 patches; see `shift`."""
EMA = 0.9
"""Decay of the averaged student (ours): C-RADIOv4's 0.9996 would stay at the first weights for 140 steps."""
DAMP = 0.1
"""Deviation of the noise on the weights (ours), as in the recipes of C-RADIOv4."""
LAMB_LR = 1.6e-2
"""The best of 4e-3, 8e-3, 1.6e-2 and 3.2e-2 by the loss of 80 steps of the demo with seed 7, of no table."""

INGREDIENTS = (
    Ingredient(
        name="phi-s",
        title="PHI-S",
        change=_phi_s,
        source="arXiv 2410.01680: one scale for all teachers' tokens evens them; best average rank of scores",
        claims={"unexplained": "lower", "unexplained-spread": "lower", "knn": "higher", "zeroshot": "higher"},
    ),
    Ingredient(
        name="angle",
        title="balanced summaries",
        change=_angle,
        source="C-RADIOv4, eq. 3 to 7: one scale for all teachers' summaries evens them",
        claims={"angle-spread": "lower"},
    ),
    Ingredient(
        name="sides",
        title="several resolutions",
        change=_sides,
        source="RADIOv2.5, C-RADIOv4: every teacher at low and high resolution, against mode switching",
        claims={"knn-index": "higher", "zeroshot-index": "higher"},
    ),
    Ingredient(
        name="mosaic",
        title="mosaics",
        change=_mosaic,
        source="RADIOv2.5: SAM teaches small images at a quarter of its cost; no figure is published",
    ),
    Ingredient(
        name="shift",
        title="shifted crops",
        change=_shift,
        control=smaller_crops,
        control_title="crops as small",
        source="C-RADIOv4, eq. 1: no fixed-pattern noise (see fixed-noise), which these teachers hardly have",
    ),
    Ingredient(
        name="mesa",
        title="MESA",
        change=_mesa,
        source="C-RADIOv4, eq. 2: no figure is published; weight 1, start and decay are ours",
    ),
    Ingredient(
        name="spectral",
        title="spectral weights",
        change=lambda base: replace(base, spectral=True),
        source="PHI-S, C-RADIO: every linear layer's largest singular value decays; no figure is published",
    ),
    Ingredient(
        name="damp",
        title="DAMP",
        change=lambda base: replace(base, damp=DAMP),
        source="C-RADIOv4: noise on the weights, for robustness; no figure is published, nor its deviation",
    ),
    Ingredient(
        name="lamb",
        title="LAMB",
        change=_lamb,
        source="the optimizer of PHI-S, of which nothing is claimed; with a rate of its own",
    ),
)
"""The ingredients, in the order in which they are put together."""


def _base() -> TrainConfig:
    """Return the recipe without any ingredient: eq. 2 and 3, three teachers, 140 steps."""
    return replace(
        small_base(),
        recipe="ablations",
        out=Path("runs/ablations"),
        teachers=SCENES_TEACHERS,
        steps=140,
        # at the base's sides in every row, whatever else a row's student has seen
        tasks={"fidelity": replace(FIDELITY, sides=BASE_SIDES), "resolution": RESOLUTION},
    )


def _with(base: TrainConfig, without: str = "") -> TrainConfig:
    """Put all ingredients together, except perhaps one, which its control replaces."""
    for each in INGREDIENTS:
        if each.name != without:
            base = each.change(base)
        elif each.control is not None:
            base = each.control(base)
    return base


def _make_runs(base: TrainConfig) -> Runs:
    return {
        "base": base,
        **{each.name: each.change(base) for each in INGREDIENTS},
        **{f"{each.name}-control": each.control(base) for each in INGREDIENTS if each.control is not None},
        "all": _with(base),
        **{f"no-{each.name}": _with(base, each.name) for each in INGREDIENTS},
    }


def ablations() -> TableLayout:
    """What came after the paper: each ingredient alone, all of them, all but one."""
    lines = [Line(label="base", run="base")]
    for each in INGREDIENTS:
        claims = {**_COMPARED, **each.claims}
        against = "base"
        if each.control is not None:
            against = f"base, {each.control_title}"
            lines.append(Line(label=against, run=f"{each.name}-control", against="base", claims=_COMPARED))
        lines.append(Line(label=f"+ {each.title}", run=each.name, against=against, claims=claims))
    whole = {**_COMPARED, "knn": "higher", "zeroshot": "higher", "unexplained": "lower"}
    lines.append(Line(label="all", run="all", against="base", claims=whole))
    for each in INGREDIENTS:
        claims = {column: _OPPOSITE[claim] for column, claim in {**_COMPARED, **each.claims}.items()}
        label = f"all but {each.title}" + (f", {each.control_title}" if each.control is not None else "")
        lines.append(Line(label=label, run=f"no-{each.name}", against="all", claims=claims))
    unexplained = ("unexplained", *SPREADS["unexplained-spread"][0], "unexplained-spread")
    return TableLayout(
        name="ablations",
        title="each ingredient alone, all of them, all but one",
        size="small",
        base=_base(),
        columns=(
            *unexplained,
            "angle-spread",
            "knn",
            "zeroshot",
            "knn-index",
            "zeroshot-index",
            "ade20k",
            "coco",
        ),
        lines=tuple(lines),
        make_runs=_make_runs,
        num_seeds=SEEDS,
        by_request=("seg", "sam"),
        remarks=(
            "all: claimed by the recipes that put them together; nobody has published that it is so.",
            *(f"{each.title}: {each.source}." for each in INGREDIENTS),
            (
                "crops as small: to 44 % of their area, as much as a shifted frame of 8 x 8 tokens (CLIP's, "
                "DINOv2's) shows of its canvas. One of 14 x 14 (SAM's) shows 61 %, of 6 x 6 (at 72 px) 36 %: "
                "there the control is not exact."
            ),
        ),
    )
