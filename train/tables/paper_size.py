"""The paper's tables at its own size: teachers' files, data sets and ranks are the user's.

The paper does not say which student its tables 1 and 2 have. The scores of table 1's configuration A are
those of ViT-L/14 elsewhere, and of its configuration B those of ViT-H/14: we take these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evals.core.paper import (
    TABLE_1,
    TABLE_4,
    TABLE_6,
    TABLE_6_MODELS,
    TABLE_7,
    TABLE_8,
    TABLE_8_OTHER,
    TABLE_10,
    TABLE_11,
    PaperRow,
)
from evals.vqa.settings import VqaSettings
from radio.datasets import read_data_sets
from radio.errors import ConfigError, shown
from radio.students import StudentOptions, ViTDetOptions, ViTOptions

from ..config import DataConfig, TeacherConfig, TrainConfig
from ..recipes import CLIP, DINO, SAM, paper_b14, paper_h14
from .layout import OTHERS, VQA, Line, Runs, TableLayout, find_row, nearest_side
from .paper_ablations import balancing, pooling, spatial_losses

OPENCLIP = TeacherConfig(
    name="clip",
    model="openclip:ViT-H-14@weights/open_clip_vit_h14_laion2b_s32b_b79k.bin",
    resolution=224,
)
DFN_CLIP = TeacherConfig(
    name="clip", model="openclip:ViT-H-14-quickgelu@weights/dfn5b_clip_h14_224.bin", resolution=224
)
OPENAI_CLIP = TeacherConfig(
    name="openai-clip", model="openclip:ViT-L-14-quickgelu@weights/openai_clip_vit_l14.pt", resolution=224
)
DINO_L = "dinov2:vitl14@weights/dinov2_vitl14_pretrain.pth"
SAM_B, SAM_L = "sam:vit_b@weights/sam_vit_b_01ec64.pth", "sam:vit_l@weights/sam_vit_l_0b3195.pth"

DATA_SETS: Mapping[str, DataConfig] = {
    "imagenet": DataConfig(shards=("data/imagenet/{000000..001281}.tar",), workers=8),
    "imagenet-21k": DataConfig(shards=("data/imagenet-21k/{0000..2047}.tar",), workers=8),
    "laion": DataConfig(shards=("data/laion/{00000..41407}.tar",), workers=8),
    "datacomp": DataConfig(shards=("data/datacomp/{00000000..00012895}.tar",), workers=8),
}
"""Training images by their name in data.yaml; without one, where they are expected."""

PAPERS_NAMES = {
    "imagenet": "ImageNet-1k",
    "imagenet-21k": "ImageNet-21k",
    "laion": "LAION-400M",
    "datacomp": "DataComp-1B",
}


def use_data_sets(config: TrainConfig, *, allow_pipes: bool = False) -> TrainConfig:
    """Return a run's settings with the data sets and teachers' files of its data root, if it has one.

    Args:
        config: the run's settings.
        allow_pipes: shards of the data root may run a command (pipe:COMMAND).

    Raises:
        ConfigError: the data root cannot be read, or its shards would run a command without `allow_pipes`.
    """
    if config.data_root is None:
        return config
    sets, data, teachers = read_data_sets(config.data_root), config.data, config.teachers
    for name, expected in DATA_SETS.items():
        place = getattr(sets, name.replace("-", "_"))
        if data.shards == expected.shards and place is not None:
            if name == "imagenet":
                data = replace(data, shards=(), images=(Path(place) / "train",))
            else:
                if not allow_pipes:
                    _check_no_pipe(name, str(place), config.data_root)
                data = replace(data, shards=(str(place),))
            break
    teachers = tuple(replace(each, model=place_weights(each.model, config)) for each in teachers)
    return replace(config, data=data, teachers=teachers)


def _check_no_pipe(name: str, pattern: str, root: Path) -> None:
    from ..data.shards import runs_program  # needs torch, which command lines do not wait for

    if (program := runs_program(pattern)) is not None:
        raise ConfigError(
            f"{shown(root)}: {name} would run the command {program!r}; "
            f"where you trust it, add --allow-pipes, or else give your own --data.shards"
        )


def place_weights(spec: str, config: TrainConfig) -> str:
    """Return a teacher's spec with its file in the folder of weights of the data root, if it has one."""
    if config.data_root is None or (folder := read_data_sets(config.data_root).weights) is None:
        return spec
    return spec.replace("@weights/", f"@{folder}/")


SPECS = {
    "OpenCLIP H/14": OPENCLIP.model,
    "OpenCLIP ViT-H/14": OPENCLIP.model,
    "MetaCLIP ViT-H/14": CLIP.model,
    "OpenAI CLIP ViT-L/14": OPENAI_CLIP.model,
    "DINOv2 L/14": DINO_L,
    "DINOv2 ViT-L/14": DINO_L,
    "DINOv2 G/14": DINO.model,
    "DINOv2 ViT-g/14": DINO.model,
    "SAM Base": SAM_B,
    "SAM Large": SAM_L,
    "SAM ViTDet-L/16": SAM_L,
    "SAM Huge": SAM.model,
    "SAM ViTDet-H/16": SAM.model,
}
"""Specs of the paper's teachers, by its names."""


def large_base() -> TrainConfig:
    """Return the recipe of configuration A: ViT-L/14 from OpenCLIP H/14 and DINOv2 g/14 on DataComp-1B."""
    return replace(
        paper_h14(),
        recipe="paper-l14",
        out=Path("runs/tables/paper"),
        student="vit-l14",
        options=ViTOptions(),
        teachers=(OPENCLIP, DINO),
        data=DATA_SETS["datacomp"],
        # A quarter of SAM's tokens, which fit LLaVA's context; the paper's TextVQA has OCR tokens in prompts.
        tasks={"vqa": VqaSettings(image_tokens=1024, ocr=True)},
    )


def huge_base() -> TrainConfig:
    """Return the recipe of configuration B: ViT-H/14 from MetaCLIP H/14 and DINOv2 g/14 on DataComp-1B."""
    return replace(large_base(), recipe="paper-vit-h14", student="vit-h14", teachers=(CLIP, DINO))


def _teachers(table: Sequence[PaperRow], against: str = "") -> list[Line]:
    """Return the lines of a table's teachers."""
    return [
        Line(
            label=row.model,
            model=SPECS[row.model],
            paper=row,
            against="" if row.model == against else against,
        )
        for row in table
        if row.model in SPECS
    ]


def table1() -> TableLayout:
    """The data of the distillation: four sets, two configurations."""

    def make_runs(base: TrainConfig) -> Runs:
        huge = replace(base, student="vit-h14", teachers=(CLIP, DINO))
        return {
            f"{config}-{name}": replace(own, data=replace(base.data, shards=data.shards))
            for config, own in (("a", base), ("b", huge))
            for name, data in DATA_SETS.items()
        }

    lines = [
        Line(
            label=f"config {config}: {paper_set}",
            run=f"{config.lower()}-{name}",
            paper=find_row(TABLE_1, f"RADIO, config {config}, {paper_set}"),
            against="" if name == "imagenet" else f"config {config}: {PAPERS_NAMES['imagenet']}",
        )
        for config in "AB"
        for name, paper_set in PAPERS_NAMES.items()
    ]
    best = [
        Line(
            label=f"config {config}: {name}",
            model=teacher.model,
            paper=find_row(TABLE_1, f"config {config}, best teacher"),
            columns=columns,
        )
        for config, clip in (("A", OPENCLIP), ("B", CLIP))
        for name, teacher, columns in (
            ("DINOv2 g/14", DINO, ("knn", "ade20k")),
            ("CLIP H/14", clip, ("zeroshot",)),
        )
    ]
    return TableLayout(
        name="table1",
        title="the data of the distillation",
        size="paper",
        base=large_base(),
        columns=("knn", "zeroshot", "ade20k"),
        lines=(*best, *lines),
        make_runs=make_runs,
        remarks=("The students of both configurations are inferred from other tables.",),
    )


def table2() -> TableLayout:
    """Spatial losses of no teacher, of one, of both."""
    runs = ("no-spatial", "spatial-clip", "spatial-dino", "a-datacomp")
    table = spatial_losses("paper", large_base(), runs, ("none", "CLIP", "DINOv2", "both"))
    return replace(table, remarks=("The student is inferred from other tables.", _DATA_REMARK))


_DATA_REMARK = (
    "The paper does not name this table's data: here it is DataComp-1B. Its zero-shot of table 2 (74.85) and "
    "its k-NN of table 4 (82.84) are those of LAION-400M in table 1, other columns are not."
)


def table3() -> TableLayout:
    """How the losses are balanced: ViT-B/14 from MetaCLIP H/14 and DINOv2 g/14."""
    return balancing(
        "paper", replace(paper_b14(), out=large_base().out, tasks=large_base().tasks), "b14-naive", "b14-"
    )


def table4() -> TableLayout:
    """Cropped position embeddings (CPE)."""
    without = "ViT-L/14 without CPE"
    lines = (
        *_teachers(TABLE_4),
        Line(label=without, run="no-cpe", paper=find_row(TABLE_4, f"RADIO {without}")),
        Line(
            label="ViT-L/14 with CPE",
            run="a-datacomp",
            paper=find_row(TABLE_4, "RADIO ViT-L/14 with CPE"),
            against=without,
        ),
    )
    return TableLayout(
        name="table4",
        title="cropped position embeddings",
        size="paper",
        base=large_base(),
        columns=("knn", "ade20k"),
        lines=lines,
        make_runs=lambda base: {"no-cpe": replace(base, options=ViTOptions(cpe=False)), "a-datacomp": base},
        remarks=(_DATA_REMARK,),
    )


def table5() -> TableLayout:
    """The class token as summary, or average pooling: ViT-H/14."""
    return pooling("paper", huge_base(), "b-datacomp")


_VQA_REMARK = (
    "VQA: TextVQA with OCR tokens in the prompt; GQA and VQAv2 on the questions that the data root names. "
    "The paper's are GQA's validation questions (test-dev, which a folder with both is read as, gives about "
    "8 points less) and VQAv2's test-dev, whose answers are not public: a folder's are those of val."
)
_FIRST = {"vit-b14": "", "e-radio-b-noup": "e-radio-b"}
"""What students of table 6 are compared with, where that is not `vit-b14`."""
_EFFICIENT = tuple(name for name in TABLE_6_MODELS if not name.startswith(("dinov2:", "openclip:")))


def _efficient_base() -> TrainConfig:
    """Return table 6's recipe: OpenCLIP H/14 and DINOv2 g/14, ImageNet-21k, batch 4096 (§5.1)."""
    return replace(large_base(), recipe="paper-table6", batch_size=4096, data=DATA_SETS["imagenet-21k"])


def _student(base: TrainConfig, name: str) -> TrainConfig:
    return replace(base, student=name, options=StudentOptions(), resolution=nearest_side(name, base))


def table6() -> TableLayout:
    """Efficient backbones under one recipe."""
    lines = [
        Line(
            label=TABLE_6_MODELS[name],
            run=name.replace(":", "-"),
            paper_model=name,
            paper=find_row(TABLE_6, TABLE_6_MODELS[name]),
            against=TABLE_6_MODELS.get(_FIRST.get(name, "vit-b14"), ""),
        )
        for name in _EFFICIENT
    ]
    return TableLayout(
        name="table6",
        title="efficient backbones",
        size="paper",
        base=_efficient_base(),
        columns=("parameters", "images_per_second", *OTHERS, "feature_loss"),
        lines=(*_teachers(TABLE_6), *lines),
        make_runs=lambda base: {name.replace(":", "-"): _student(base, name) for name in _EFFICIENT},
        remarks=("FasterViT, which the paper's text names, is in neither table.",),
    )


def _against_teachers(number: int, table: Sequence[PaperRow], run: str, remark: str) -> TableLayout:
    clip = "OpenCLIP ViT-H/14"

    def make_runs(base: TrainConfig) -> Runs:
        students = {
            "e-radio-l": _student(
                replace(base, teachers=(OPENCLIP, DINO), batch_size=4096, data=DATA_SETS["imagenet-21k"]),
                "e-radio-l",
            ),
            "radio-v1": replace(
                base, options=ViTOptions(registers=5), teachers=(DFN_CLIP, OPENAI_CLIP, DINO)
            ),
            "b-datacomp": base,
        }
        return {name: students[name] for name in ("e-radio-l", run)}

    return TableLayout(
        name=f"table{number}",
        title="students and teachers",
        size="paper",
        base=huge_base(),
        columns=(*OTHERS, "voc", *VQA, "images_per_second"),
        lines=(
            *_teachers(table, clip),
            Line(
                label="E-RADIO-L",
                run="e-radio-l",
                paper_model="e-radio-l",
                paper=find_row(table, "E-RADIO-L"),
                against="RADIO ViT-H/14",
            ),
            Line(label="RADIO ViT-H/14", run=run, paper=find_row(table, "RADIO ViT-H/14"), against=clip),
        ),
        make_runs=make_runs,
        remarks=(remark, _VQA_REMARK),
    )


def table7() -> TableLayout:
    """Students and teachers on every task, with the released RADIOv1."""
    remark = "RADIOv1 (the paper's †) learns from DFN CLIP, OpenAI CLIP and DINOv2, and has five registers."
    return _against_teachers(7, TABLE_7, "radio-v1", remark)


def table8() -> TableLayout:
    """RADIO ViTDet-H/14 in SAM's place, by the side of its windows."""
    first = "window 8"
    lines = [
        *_teachers(TABLE_8),
        *(
            Line(
                label=f"window {side}",
                run="vitdet-h14",
                window=side,
                paper=find_row(TABLE_8, f"RADIO ViTDet-H/14, window {side}"),
                against="SAM Huge" if side == 8 else first,
                columns=("coco", "images_per_second"),
            )
            for side in (8, 9, 18)
        ),
        *(
            Line(
                label=f"{row.model}, other benchmarks",
                model=SPECS.get(row.model, ""),
                run="" if row.model in SPECS else "vitdet-h14",
                paper=row,
                columns=(*OTHERS, "voc"),
            )
            for row in TABLE_8_OTHER
        ),
    ]
    return TableLayout(
        name="table8",
        title="in SAM's place",
        size="paper",
        base=replace(paper_h14(), out=large_base().out, tasks=large_base().tasks),
        columns=("coco", "images_per_second", *OTHERS, "voc"),
        lines=tuple(lines),
        make_runs=lambda base: {"vitdet-h14": replace(base, options=ViTDetOptions())},
        speed_resolution=1008,
    )


def table10() -> TableLayout:
    """The teachers."""
    return TableLayout(
        name="table10",
        title="the teachers",
        size="paper",
        base=huge_base(),
        columns=("images_per_second", *OTHERS, "voc", *VQA),
        lines=tuple(_teachers(TABLE_10, "OpenCLIP ViT-H/14")),
        make_runs=lambda base: {},
        remarks=(_VQA_REMARK,),
    )


def table11() -> TableLayout:
    """Table 7 as it was published first."""
    return _against_teachers(11, TABLE_11, "b-datacomp", "RADIO is the ViT-H/14 of tables 1 and 5.")
