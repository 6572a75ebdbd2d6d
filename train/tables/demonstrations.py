"""Three claims with known ground truth, each by one command on the generated world, minutes a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from evals.fixed_pattern import PatternSettings

from ..config import LossConfig, NormaliseConfig, SidesConfig, TrainConfig
from ..recipes import SCENES_TEACHERS
from .ablations import FIDELITY, MEASURED_STEPS, RESOLUTION, SHIFT, smaller_crops
from .layout import SIDES, SPREADS, Claim, Curve, Line, Runs, TableLayout
from .small import SEEDS, small_base

CLIP, DENSE, SAM = SCENES_TEACHERS


def mode_switching() -> TableLayout:
    """Teachers split by resolution, or shared by all: k-NN and zero-shot over the side of the input."""
    low, high = 96, 192

    def make_runs(base: TrainConfig) -> Runs:
        clip, dense = base.teachers
        return {
            "split": replace(base, teachers=(clip, replace(dense, student_resolution=high))),
            "shared": replace(base, resolutions=SidesConfig(sides=(low, high))),
            "drawn": replace(base, resolutions=SidesConfig(sides=SIDES)),
        }

    tasks = ("knn", "zeroshot")
    curves = {task: tuple(f"{task}-{side}px" for side in SIDES) for task in tasks}
    flat: dict[str, Claim] = {}
    for task in tasks:
        flat |= {f"{task}-{low}px": "", f"{task}-{high}px": "higher", f"{task}-index": "higher"}
    apart = f"clip at {low}, dense at {high}"
    return TableLayout(
        name="mode-switching",
        title="teachers split by resolution, or all at all sides",
        size="small",
        base=replace(
            small_base(),
            recipe="mode-switching",
            out=Path("runs/mode-switching"),
            resolution=low,
            steps=240,
            batch_size=16,  # of each teacher's images in every step, in all rows
            tasks={"resolution": RESOLUTION},
        ),
        columns=tuple(name for task in tasks for name in (*curves[task], f"{task}-index")),
        lines=(
            Line(label=apart, run="split"),
            Line(label=f"both at {low} and {high}", run="shared", against=apart, claims=flat),
            Line(label="both at five sides", run="drawn", against=apart, claims=flat),
        ),
        make_runs=make_runs,
        num_seeds=SEEDS,
        curves=tuple(
            Curve(title=title, x=SIDES, columns=curves[task])
            for task, title in zip(tasks, ("k-NN, top-1 (%)", "zero-shot, top-1 (%)"), strict=True)
        ),
        remarks=(
            (
                "Claimed by RADIOv2.5: teachers split by resolution make a student that is another model at "
                "the other side; all teachers at all sides do not."
            ),
            "Zero-shot goes through the adaptor of clip, k-NN takes the student's own summary.",
            "In every row each teacher teaches 16 images a step; where they are split, the student sees 32.",
        ),
    )


def teacher_scales() -> TableLayout:
    """Teachers whose tokens have standard deviations of 0.03, 1.2 and 5.5: which are learned, by the loss."""
    teachers = (
        replace(CLIP, model="scenes:clip-scaled"),
        DENSE,
        replace(SAM, model="scenes:sam-scaled"),
    )
    # smooth L1 is quadratic up to beta, which no error here reaches: 2 beta * (d^2 / (2 beta)) = d^2
    squared = LossConfig(cosine=0.0, smooth_l1=2000.0, smooth_l1_beta=1000.0)
    uneven: Mapping[str, Claim] = {
        "unexplained": "higher",
        "unexplained-spread": "higher",
        "knn": "",
        "zeroshot": "",
    }

    def make_runs(base: TrainConfig) -> Runs:
        normalised = NormaliseConfig(kind="phi-s", steps=MEASURED_STEPS)
        return {
            "phi-s": replace(base, normalise=normalised),
            "eq3": base,
            "mse": replace(base, loss=squared),
        }

    return TableLayout(
        name="teacher-scales",
        title="teachers of unlike scale",
        size="small",
        base=replace(
            small_base(),
            recipe="teacher-scales",
            out=Path("runs/teacher-scales"),
            teachers=teachers,
            steps=200,
            tasks={"fidelity": FIDELITY},
        ),
        columns=("unexplained", *SPREADS["unexplained-spread"][0], "unexplained-spread", "knn", "zeroshot"),
        lines=(
            Line(label="PHI-S", run="phi-s"),
            Line(label="eq. 3", run="eq3", against="PHI-S", claims=uneven),
            Line(label="squared error", run="mse", against="PHI-S", claims=uneven),
        ),
        make_runs=make_runs,
        num_seeds=SEEDS,
        remarks=(
            "Claimed by PHI-S (arXiv 2410.01680): one scale for all teachers evens what is learned of them.",
            (
                "Eq. 3 leaves the size of clip's tokens almost free: cosine does not see it, and smooth L1 "
                "costs next to nothing at errors far below 1. Hence far more than 100."
            ),
            "Standard deviations of tokens: clip 0.0286, as DFN CLIP's; dense 1.2; sam 5.4688, as SAM-H's.",
            "The heads' steps do not depend on a loss's scale, by Muon as by PHI-S's LAMB; the trunk's do.",
        ),
    )


def fixed_noise() -> TableLayout:
    """A fixed pattern on a teacher's grid: what a student learns of it, by the loss."""

    def make_runs(base: TrainConfig) -> Runs:
        clip, dense = base.teachers
        clean = replace(base, teachers=(clip, replace(dense, model=DENSE.model)))
        shifted = replace(base.loss, shift=SHIFT)
        return {
            "clean": smaller_crops(clean),
            "noisy": smaller_crops(base),
            "noisy-shift": replace(base, loss=shifted),
            "clean-shift": replace(clean, loss=shifted),
        }

    return TableLayout(
        name="fixed-noise",
        title="a teacher with a fixed pattern",
        size="small",
        base=replace(
            small_base(),
            recipe="fixed-noise",
            out=Path("runs/fixed-noise"),
            teachers=(CLIP, replace(DENSE, model="scenes:dense-noisy")),
            resolution=108,  # the dense teacher's grid of 9 x 9, so that the student can show the pattern
            tasks={
                "fidelity": replace(FIDELITY, teachers=("dense=scenes:dense",)),
                "pattern": PatternSettings(),
            },
        ),
        columns=("pattern", "unexplained-dense", "knn", "zeroshot"),
        lines=(
            Line(label="clean teacher", run="clean"),
            Line(
                label="noisy teacher",
                run="noisy",
                against="clean teacher",
                claims={"pattern": "higher", "unexplained-dense": "higher", "knn": "", "zeroshot": ""},
            ),
            Line(
                label="noisy teacher, shifted",
                run="noisy-shift",
                against="noisy teacher",
                claims={"pattern": "lower", "unexplained-dense": "lower", "knn": "", "zeroshot": ""},
            ),
            Line(
                label="clean teacher, shifted",
                run="clean-shift",
                against="clean teacher",
                claims=dict.fromkeys(("pattern", "unexplained-dense", "knn", "zeroshot"), ""),
            ),
        ),
        make_runs=make_runs,
        num_seeds=SEEDS,
        remarks=(
            "Claimed by C-RADIOv4 (eq. 1): a teacher's fixed pattern is learned, and not by the shift loss.",
            "unexplained: dense is against the clean teacher, whichever the student learned from.",
            f"Shifted by {SHIFT} patches, 27 % of the steps have none between both; so much can be learned.",
            "All rows see as much of an image: without shifts the crops are as small as a shifted frame.",
        ),
    )
