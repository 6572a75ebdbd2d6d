"""The paper's results as data, to be printed beside our numbers and never as ours.

Ranzinger, Heinrich, Kautz, Molchanov: AM-RADIO, CVPR 2024 (arXiv 2312.06709). Where two of its tables
disagree, the row's `remark` notes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["student", "teacher"]

PAPER = "AM-RADIO, CVPR 2024"

DATA: Mapping[str, str] = {
    "zeroshot": "ImageNet-1k, top-1",
    "knn": "ImageNet-1k, k = 20, top-1",
    "ade20k": "ADE20K, linear probe, mIoU",
    "voc": "Pascal VOC 2012, linear probe, mIoU",
    "gqa": "GQA",
    "sqa": "ScienceQA, image subset",
    "textvqa": "TextVQA",
    "vqav2": "VQAv2 test-dev",
    "coco": "COCO 2017 instances, ground-truth boxes, mIoU",
    "images_per_second": "throughput as the paper gives it; its tables differ",
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


TABLE_3 = _table(
    3,
    "zeroshot knn ade20k",
    ("RADIO ViT-B/14, naive balancing", "student", 70.63, 79.5, 44.71),
    ("RADIO ViT-B/14, uncertainty balancing", "student", 70.92, 79.37, 44.57),
    ("RADIO ViT-B/14, AdaLoss balancing", "student", 71.31, 79.77, 44.36),
)
TABLE_6 = _table(
    6,
    "zeroshot knn ade20k images_per_second",
    ("DINOv2 G/14", "teacher", None, 83.41, 47.53, 313),
    ("OpenCLIP H/14", "teacher", 77.19, 81.1, 40.04, 556),
    ("RADIO ViT-B/32", "student", 70.39, 75.64, 36.15, 17152),
    ("RADIO ViT-B/14", "student", 73.84, 80.73, 44.71, 3699),
    ("RADIO ViT-L/14", "student", 77.25, 84.03, 48.7, 1126),
    ("RADIO ViT-H/14", "student", 78.62, 84.17, 49.01, 556),
    ("EfficientNetV2-S", "student", 65.37, 70.72, 27.75, 9017),
    ("ResNetv2-101", "student", 69.58, 75.32, 29.61, 7283),
    ("RegNetY-064", "student", 69.84, 74.59, 28.9, 6573),
    ("EfficientViT-L1", "student", 71.73, 79.9, 33.12, 6048),
    ("ConvNext-B", "student", 75.43, 81.73, 38.95, 1805),
    ("NFNet-F3", "student", 76.93, 80.5, 38.31, 1777),
    ("SwinV2-S", "student", 74.7, 81.12, 35.57, 1497),
    ("MaxViT-B", "student", 77.49, 79.34, 38.46, 1486),
    ("PoolformerV2-M36", "student", 74.46, 80.49, 35.05, 1194),
    ("MViTV2-B", "student", 75.92, 81.39, 41.39, 975),
    ("E-RADIO-B", "student", 75.19, 82.21, 44.03, 6422),
    ("E-RADIO-B without upsampling", "student", 75.45, 82.05, 41.26, 7040),
    ("E-RADIO-L", "student", 77.87, 83.73, 45.5, 3472),
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
        "SAM ViTDet-L/16": "table 10 has 59.87/67.08/43.90/62.46 for the four of VQA, and 26 images/s",
        "RADIO ViT-H/14": "the weights released after publication, with DFN CLIP among the teachers",
    },
)
TABLE_8 = _table(
    8,
    "coco images_per_second",
    ("SAM Base", "teacher", 75.78, 29.18),
    ("SAM Large", "teacher", 77.01, 13.52),
    ("SAM Huge", "teacher", 77.18, 8.56),
    ("RADIO ViTDet-H/14, window 8", "student", 75.17, 8.2),
    ("RADIO ViTDet-H/14, window 9", "student", 75.31, 8.04),
    ("RADIO ViTDet-H/14, window 18", "student", 75.42, 7.45),
)
TABLE_10 = _table(
    10,
    "knn ade20k voc gqa sqa textvqa vqav2 images_per_second",
    ("SAM ViTDet-H/16", "teacher", 22.39, 28.17, 32.16, 57.62, 63.26, 43.34, 60.0, 16),
)

ROWS: tuple[PaperRow, ...] = (*TABLE_3, *TABLE_6, *TABLE_7, *TABLE_8, *TABLE_10)

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
