"""The paper's results as data, to be printed beside our numbers and never as ours.

Ranzinger, Heinrich, Kautz, Molchanov: AM-RADIO, CVPR 2024 (arXiv 2312.06709): every number of its tables 1
to 11. Where two of them disagree, or one has a misprint, the row's `remark` notes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["student", "teacher", "other"]  # other: a model of another work

PAPER = "AM-RADIO, CVPR 2024"

DATA: Mapping[str, str] = {
    "zeroshot": "ImageNet-1k, top-1",
    "knn": "ImageNet-1k, k = 20, top-1",
    "ade20k": "ADE20K, linear probe, mIoU",
    "voc": "Pascal VOC 2012, linear probe, mIoU",
    "gqa": "GQA val (test-dev gives about 8 points less)",
    "sqa": "ScienceQA, image subset",
    "textvqa": "TextVQA val, with OCR tokens in the prompt",
    "vqav2": "VQAv2 test-dev",
    "coco": "COCO 2017 instances, ground-truth boxes, mIoU",
    "images_per_second": "throughput as the paper gives it; its tables differ",
    "parameters": "parameters in millions",
    "summary_loss": "summary loss of the distillation, lower is better",
    "feature_loss": "spatial loss of the distillation (table 6: FD loss), lower is better",
}
"""The data set and metric of each column of the paper."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "zeroshot": ("zeroshot",),
    "knn": ("knn",),
    "seg": ("ade20k", "voc"),
    "sam": ("coco",),
    "vqa": ("gqa", "sqa", "textvqa", "vqav2"),
}
"""The columns that belong to each of our tasks; the first is its primary metric."""

PRIMARY: Mapping[str, tuple[str, str]] = {
    "zeroshot": ("top1", "zeroshot"),
    "knn": ("top1", "knn"),
    "seg": ("miou", "ade20k"),
    "sam": ("miou", "coco"),
}
"""For our tasks, the primary metric that the paper has too, and its column; it has no mean over VQA's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One model of one table of the paper."""

    model: str
    kind: Kind
    table: str
    values: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""

    @property
    def source(self) -> str:
        """Paper and table that contain the row."""
        return f"{PAPER}, {self.table}"


def _table(
    number: int,
    columns: str,
    *rows: tuple[str, Kind, *tuple[float | None, ...]],
    remarks: Mapping[str, str] | None = None,
) -> tuple[PaperRow, ...]:
    """Build a table's rows of model, kind and values; None where it has none, as zero-shot without text."""
    return tuple(
        PaperRow(
            model=model,
            kind=kind,
            table=f"table {number}",
            values={
                name: value for name, value in zip(columns.split(), values, strict=True) if value is not None
            },
            remark=(remarks or {}).get(model, ""),
        )
        for model, kind, *values in rows
    )


_DINO_SPEED = "313 images/s in table 6"
_ERADIO_SPEED = "3472 images/s in table 6; its ratio to DINOv2 g/14 there is the 11.1 of the text"
_SHIFTED = "misprinted under zero-shot, k-NN and ADE20K, one column to the left; see table 10"

TABLE_1 = _table(
    1,
    "knn zeroshot ade20k",
    ("config A, best teacher", "teacher", 83.41, 77.19, 47.53),
    ("RADIO, config A, ImageNet-1k", "student", 84.79, 77.93, 48.0),
    ("RADIO, config A, ImageNet-21k", "student", 84.03, 77.25, 48.7),
    ("RADIO, config A, LAION-400M", "student", 82.84, 74.85, 48.41),
    ("RADIO, config A, DataComp-1B", "student", 83.17, 76.9, 48.42),
    ("config B, best teacher", "teacher", 83.41, 80.51, 47.53),
    ("RADIO, config B, ImageNet-1k", "student", 84.79, 80.44, 48.11),
    ("RADIO, config B, ImageNet-21k", "student", 84.61, 80.1, 48.65),
    ("RADIO, config B, LAION-400M", "student", 83.77, 77.46, 48.6),
    ("RADIO, config B, DataComp-1B", "student", 83.91, 78.51, 49.01),
    remarks={
        "config A, best teacher": "k-NN and ADE20K of DINOv2 g/14, zero-shot of OpenCLIP H/14 (table 10)",
        "config B, best teacher": "k-NN and ADE20K of DINOv2 g/14, zero-shot of MetaCLIP H/14 (table 10)",
        "RADIO, config A, ImageNet-21k": "the ViT-L/14 of table 6",
        "RADIO, config B, DataComp-1B": "k-NN and ADE20K as in table 5, where zero-shot is 78.55",
    },
)
TABLE_2 = _table(
    2,
    "zeroshot knn ade20k",
    ("RADIO, no spatial loss", "student", 75.77, 82.59, 41.18),
    ("RADIO, spatial loss of CLIP", "student", 75.64, 82.6, 44.42),
    ("RADIO, spatial loss of DINOv2", "student", 74.68, 83.02, 47.05),
    ("RADIO, spatial loss of both", "student", 74.85, 82.96, 48.13),
)
TABLE_3 = _table(
    3,
    "zeroshot knn ade20k",
    ("RADIO ViT-B/14, naive balancing", "student", 70.63, 79.5, 44.71),
    ("RADIO ViT-B/14, uncertainty balancing", "student", 70.92, 79.37, 44.57),
    ("RADIO ViT-B/14, AdaLoss balancing", "student", 71.31, 79.77, 44.36),
)
TABLE_4 = _table(
    4,
    "knn ade20k",
    ("OpenCLIP H/14", "teacher", 81.1, 40.04),
    ("DINOv2 L/14", "teacher", 83.44, 46.55),
    ("RADIO ViT-L/14 without CPE", "student", 82.96, 47.3),
    ("RADIO ViT-L/14 with CPE", "student", 82.84, 48.52),
)
TABLE_5 = _table(
    5,
    "summary_loss feature_loss zeroshot knn ade20k voc gqa sqa textvqa vqav2",
    ("RADIO, class token", "student", 0.07, 0.09, 78.55, 83.91, 49.01, 83.51, 70.46, 65.89, 53.36, 77.66),
    ("RADIO, average pooling", "student", 0.05, 0.12, 80.12, 83.83, 38.36, 77.04, 70.92, 65.84, 54.26, 78.28),
    remarks={"RADIO, class token": "table 11's ViT-H/14, where zero-shot is 78.62 and k-NN 84.17"},
)
TABLE_6 = _table(
    6,
    "parameters images_per_second zeroshot knn ade20k feature_loss",
    ("DINOv2 G/14", "teacher", 1140, 313, None, 83.41, 47.53, None),
    ("OpenCLIP H/14", "teacher", 632, 556, 77.19, 81.1, 40.04, None),
    ("RADIO ViT-B/32", "student", 88, 17152, 70.39, 75.64, 36.15, 0.382),
    ("RADIO ViT-B/14", "student", 86, 3699, 73.84, 80.73, 44.71, 0.19),
    ("RADIO ViT-L/14", "student", 304, 1126, 77.25, 84.03, 48.7, 0.151),
    ("RADIO ViT-H/14", "student", 632, 556, 78.62, 84.17, 49.01, 0.087),
    ("EfficientNetV2-S", "student", 21, 9017, 65.37, 70.72, 27.75, 0.415),
    ("ResNetv2-101", "student", 44, 7283, 69.58, 75.32, 29.61, 0.405),
    ("RegNetY-064", "student", 30, 6573, 69.84, 74.59, 28.9, 0.394),
    ("EfficientViT-L1", "student", 38, 6048, 71.73, 79.9, 33.12, 0.376),
    ("ConvNext-B", "student", 88, 1805, 75.43, 81.73, 38.95, 0.358),
    ("NFNet-F3", "student", 254, 1777, 76.93, 80.5, 38.31, 0.34),
    ("SwinV2-S", "student", 49, 1497, 74.7, 81.12, 35.57, 0.364),
    ("MaxViT-B", "student", 119, 1486, 77.49, 79.34, 38.46, 0.34),
    ("PoolformerV2-M36", "student", 56, 1194, 74.46, 80.49, 35.05, 0.377),
    ("MViTV2-B", "student", 51, 975, 75.92, 81.39, 41.39, 0.345),
    ("E-RADIO-B", "student", 118, 6422, 75.19, 82.21, 44.03, 0.319),
    ("E-RADIO-B without upsampling", "student", 113, 7040, 75.45, 82.05, 41.26, 0.353),
    ("E-RADIO-L", "student", 265, 3472, 77.87, 83.73, 45.5, 0.265),
    remarks={
        "DINOv2 G/14": "344 images/s in tables 7, 10 and 11",
        "RADIO ViT-L/14": "marked * in the paper; the ViT-L/14 of table 1, config A, ImageNet-21k",
        "RADIO ViT-H/14": "marked * in the paper; the ViT-H/14 of table 11",
        "E-RADIO-L": "3697 images/s in tables 7 and 11",
    },
)
TABLE_6_MODELS: Mapping[str, str] = {
    "dinov2:vitg14": "DINOv2 G/14",
    "openclip:ViT-H-14": "OpenCLIP H/14",
    "vit-b32": "RADIO ViT-B/32",
    "vit-b14": "RADIO ViT-B/14",
    "vit-l14": "RADIO ViT-L/14",
    "vit-h14": "RADIO ViT-H/14",
    "timm:efficientnetv2_s": "EfficientNetV2-S",
    "timm:resnetv2_101": "ResNetv2-101",
    "timm:regnety_064": "RegNetY-064",
    "timm:efficientvit_l1": "EfficientViT-L1",
    "timm:convnext_base": "ConvNext-B",
    "timm:dm_nfnet_f3": "NFNet-F3",
    "timm:swinv2_small_window8_256": "SwinV2-S",
    "timm:maxvit_base_tf_224": "MaxViT-B",
    "timm:poolformerv2_m36": "PoolformerV2-M36",
    "timm:mvitv2_base": "MViTV2-B",
    "e-radio-b": "E-RADIO-B",
    "e-radio-b-noup": "E-RADIO-B without upsampling",
    "e-radio-l": "E-RADIO-L",
}
"""Our names of the models of table 6, in its order. FasterViT, which its text names, is not in it."""

TABLE_7 = _table(
    7,
    "zeroshot knn ade20k voc gqa sqa textvqa vqav2 images_per_second",
    ("OpenCLIP ViT-H/14", "teacher", 77.19, 81.1, 40.04, 68.03, 57.86, 67.53, 48.11, 67.31, 556),
    ("MetaCLIP ViT-H/14", "teacher", 80.51, 82.12, 35.39, 62.62, 67.85, 68.77, 52.02, 75.46, 556),
    ("OpenAI CLIP ViT-L/14", "teacher", 75.54, 79.8, 36.51, 67.04, 68.8, 67.03, 53.25, 76.47, 1126),
    ("DINOv2 ViT-L/14", "teacher", None, 83.44, 46.55, 82.07, 70.16, 63.76, 45.49, 75.37, 1126),
    ("DINOv2 ViT-g/14", "teacher", None, 83.41, 47.53, 82.95, 69.29, 64.6, 45.25, 74.56, 344),
    ("SAM ViTDet-L/16", "teacher", None, 20.41, 26.56, 34.34, 61.52, 63.36, 43.29, 64.91, 14),
    ("E-RADIO-L", "student", 77.87, 83.73, 45.5, 79.95, 66.22, 65.54, 43.51, 70.74, 3697),
    ("RADIO ViT-H/14", "student", 82.73, 85.29, 50.32, 85.17, 69.17, 67.08, 54.92, 77.88, 556),
    remarks={
        "DINOv2 ViT-g/14": _DINO_SPEED,
        "SAM ViTDet-L/16": "table 10 has 59.87/67.08/43.90/62.46 for the four of VQA, and 26 images/s",
        "E-RADIO-L": _ERADIO_SPEED,
        "RADIO ViT-H/14": "the weights released after publication, with DFN CLIP among the teachers, whose "
        "zero-shot is 84.37 (footnote of table 7)",
    },
)
TABLE_8 = _table(  # at 1024 px
    8,
    "coco images_per_second",
    ("SAM Base", "teacher", 75.78, 29.18),
    ("SAM Large", "teacher", 77.01, 13.52),
    ("SAM Huge", "teacher", 77.18, 8.56),
    ("RADIO ViTDet-H/14, window 8", "student", 75.17, 8.2),
    ("RADIO ViTDet-H/14, window 9", "student", 75.31, 8.04),
    ("RADIO ViTDet-H/14, window 18", "student", 75.42, 7.45),
    remarks={
        "SAM Large": "14 images/s in tables 7 and 11, 26 in table 10",
        "SAM Huge": "16 images/s in table 10",
    },
)
TABLE_8_OTHER = _table(  # "Other benchmarks", below table 8
    8,
    "zeroshot knn ade20k voc",
    ("SAM ViTDet-L/16", "teacher", None, 20.41, 26.56, 34.34),
    ("SAM ViTDet-H/16", "teacher", None, 22.39, 28.17, 32.16),
    ("RADIO ViTDet-H/14", "student", 76.17, 83.34, 49.01, None),
    remarks={
        "SAM ViTDet-L/16": _SHIFTED,
        "SAM ViTDet-H/16": _SHIFTED,
    },
)
TABLE_9 = _table(
    9,
    "zeroshot ade20k",
    ("SAM ViTDet-H/16", "teacher", None, 28.2),
    ("CLIP ViT-L/14", "other", 79.2, 36.4),
    ("SAM-CLIP ViTDet-B/16", "other", 71.7, 38.4),
    ("RADIO ViT-H/14", "student", 78.6, 49.0),
    remarks={"CLIP ViT-L/14": "not the OpenAI CLIP ViT-L/14 of tables 7 and 11, whose zero-shot is 75.54"},
)
TABLE_10 = _table(
    10,
    "images_per_second zeroshot knn ade20k voc gqa sqa textvqa vqav2",
    ("OpenCLIP ViT-H/14", "teacher", 556, 77.19, 81.1, 40.04, 68.03, 57.86, 67.53, 48.11, None),
    ("MetaCLIP ViT-H/14", "teacher", 556, 80.51, 82.12, 35.39, 62.62, 67.85, 68.77, 52.02, 75.46),
    ("DINOv2 ViT-L/14", "teacher", 1126, None, 83.44, 46.55, 82.07, 70.16, 63.76, 45.49, 75.37),
    ("DINOv2 ViT-g/14", "teacher", 344, None, 83.41, 47.53, 82.95, 69.29, 64.6, 45.25, 74.56),
    ("SAM ViTDet-L/16", "teacher", 26, None, 20.41, 26.56, 34.34, 59.87, 67.08, 43.9, 62.46),
    ("SAM ViTDet-H/16", "teacher", 16, None, 22.39, 28.17, 32.16, 57.62, 63.26, 43.34, 60.0),
    remarks={
        "OpenCLIP ViT-H/14": "VQAv2 is 67.31 in tables 7 and 11",
        "DINOv2 ViT-g/14": _DINO_SPEED,
        "SAM ViTDet-L/16": "tables 7 and 11 have 61.52/63.36/43.29/64.91 for the four of VQA; 14 images/s",
        "SAM ViTDet-H/16": "8.56 images/s in table 8",
    },
)
TABLE_11 = _table(  # table 7 as it was published first
    11,
    "images_per_second zeroshot knn ade20k voc gqa sqa textvqa vqav2",
    ("OpenCLIP ViT-H/14", "teacher", 556, 77.19, 81.1, 40.04, 68.03, 57.86, 67.53, 48.11, 67.31),
    ("MetaCLIP ViT-H/14", "teacher", 556, 80.51, 82.12, 35.39, 62.62, 67.85, 68.77, 52.02, 75.46),
    ("OpenAI CLIP ViT-L/14", "teacher", 1126, 75.54, 79.8, 36.51, 67.04, 68.8, 67.03, 53.25, 76.47),
    ("DINOv2 ViT-L/14", "teacher", 1126, None, 83.44, 46.55, 82.07, 70.16, 63.76, 45.49, 75.37),
    ("DINOv2 ViT-g/14", "teacher", 344, None, 83.41, 47.53, 82.95, 69.29, 64.6, 45.25, 74.56),
    ("SAM ViTDet-L/16", "teacher", 14, None, 20.41, 26.56, 34.34, 61.52, 63.36, 43.29, 64.91),
    ("E-RADIO-L", "student", 3697, 77.87, 83.73, 45.5, 79.95, 66.22, 65.54, 43.51, 70.74),
    ("RADIO ViT-H/14", "student", 556, 78.62, 84.17, 49.01, 83.51, 70.46, 65.89, 53.36, 77.66),
    remarks={
        "DINOv2 ViT-g/14": _DINO_SPEED,
        "SAM ViTDet-L/16": "table 10 has 59.87/67.08/43.90/62.46 for the four of VQA, and 26 images/s",
        "E-RADIO-L": _ERADIO_SPEED,
        "RADIO ViT-H/14": "table 5 has zero-shot 78.55 and k-NN 83.91 beside the same other values",
    },
)

ROWS: tuple[PaperRow, ...] = (
    *(*TABLE_1, *TABLE_2, *TABLE_3, *TABLE_4, *TABLE_5, *TABLE_6, *TABLE_7),
    *(*TABLE_8, *TABLE_8_OTHER, *TABLE_9, *TABLE_10, *TABLE_11),
)

HEADLINE = (TABLE_7[-1], TABLE_8[-1])
"""The paper's best student in each of its two settings: the rows for a table over all tasks."""


def rows_for(task: str) -> tuple[PaperRow, ...]:
    """Return the paper's rows with a value for one of our tasks; empty for a task that it does not have."""
    columns = TASKS.get(task, ())
    return tuple(row for row in ROWS if any(name in row.values for name in columns))


def table_6_row(model: str) -> PaperRow | None:
    """Return the row of table 6 for one of our architectures or teachers, by its name without a file."""
    name = TABLE_6_MODELS.get(model.partition("@")[0])
    return next((row for row in TABLE_6 if row.model == name), None)
