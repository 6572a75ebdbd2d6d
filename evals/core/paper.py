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


_HEADLINE = ("zeroshot", "knn", "ade20k", "voc", "gqa", "sqa", "textvqa", "vqav2")


def _table7(model: str, kind: Kind, rate: float, *scores: float | None, remark: str = "") -> PaperRow:
    values = {name: score for name, score in zip(_HEADLINE, scores, strict=True) if score is not None}
    return PaperRow(
        model=model,
        kind=kind,
        table="table 7",
        values={**values, "images_per_second": rate},
        remark=remark,
    )


def _table6(
    model: str, zeroshot: float | None, knn: float, ade20k: float, rate: float, kind: Kind = "student"
) -> PaperRow:
    scores = {} if zeroshot is None else {"zeroshot": zeroshot}
    return PaperRow(
        model=model,
        kind=kind,
        table="table 6",
        values={**scores, "knn": knn, "ade20k": ade20k, "images_per_second": rate},
    )


def _table3(method: str, zeroshot: float, knn: float, ade20k: float) -> PaperRow:
    return PaperRow(
        model=f"RADIO ViT-B/14, {method} balancing",
        kind="student",
        table="table 3",
        values={"zeroshot": zeroshot, "knn": knn, "ade20k": ade20k},
    )


def _table8(model: str, kind: Kind, miou: float, rate: float) -> PaperRow:
    return PaperRow(model=model, kind=kind, table="table 8", values={"coco": miou, "images_per_second": rate})


_NO_TEXT = None  # a model without a text tower has no zero-shot

TABLE_3 = (
    _table3("naive", 70.63, 79.50, 44.71),
    _table3("uncertainty", 70.92, 79.37, 44.57),
    _table3("AdaLoss", 71.31, 79.77, 44.36),
)
TABLE_6 = (
    _table6("DINOv2 G/14", _NO_TEXT, 83.41, 47.53, 313, "teacher"),
    _table6("OpenCLIP H/14", 77.19, 81.10, 40.04, 556, "teacher"),
    _table6("RADIO ViT-B/32", 70.39, 75.64, 36.15, 17152),
    _table6("RADIO ViT-B/14", 73.84, 80.73, 44.71, 3699),
    _table6("RADIO ViT-L/14", 77.25, 84.03, 48.7, 1126),
    _table6("RADIO ViT-H/14", 78.62, 84.17, 49.01, 556),
    _table6("EfficientNetV2-S", 65.37, 70.72, 27.75, 9017),
    _table6("ResNetv2-101", 69.58, 75.32, 29.61, 7283),
    _table6("RegNetY-064", 69.84, 74.59, 28.9, 6573),
    _table6("EfficientViT-L1", 71.73, 79.90, 33.12, 6048),
    _table6("ConvNext-B", 75.43, 81.73, 38.95, 1805),
    _table6("NFNet-F3", 76.93, 80.50, 38.31, 1777),
    _table6("SwinV2-S", 74.70, 81.12, 35.57, 1497),
    _table6("MaxViT-B", 77.49, 79.34, 38.46, 1486),
    _table6("PoolformerV2-M36", 74.46, 80.49, 35.05, 1194),
    _table6("MViTV2-B", 75.92, 81.39, 41.39, 975),
    _table6("E-RADIO-B", 75.19, 82.21, 44.03, 6422),
    _table6("E-RADIO-B without upsampling", 75.45, 82.05, 41.26, 7040),
    _table6("E-RADIO-L", 77.87, 83.73, 45.5, 3472),
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

TABLE_7 = (
    _table7("OpenCLIP ViT-H/14", "teacher", 556, 77.19, 81.10, 40.04, 68.03, 57.86, 67.53, 48.11, 67.31),
    _table7("MetaCLIP ViT-H/14", "teacher", 556, 80.51, 82.12, 35.39, 62.62, 67.85, 68.77, 52.02, 75.46),
    _table7("OpenAI CLIP ViT-L/14", "teacher", 1126, 75.54, 79.80, 36.51, 67.04, 68.80, 67.03, 53.25, 76.47),
    _table7("DINOv2 ViT-L/14", "teacher", 1126, _NO_TEXT, 83.44, 46.55, 82.07, 70.16, 63.76, 45.49, 75.37),
    _table7("DINOv2 ViT-g/14", "teacher", 344, _NO_TEXT, 83.41, 47.53, 82.95, 69.29, 64.60, 45.25, 74.56),
    _table7(
        "SAM ViTDet-L/16",
        "teacher",
        14,
        _NO_TEXT,
        20.41,
        26.56,
        34.34,
        61.52,
        63.36,
        43.29,
        64.91,
        remark="table 10 has 59.87/67.08/43.90/62.46 for the four of VQA, and 26 images/s",
    ),
    _table7("E-RADIO-L", "student", 3697, 77.87, 83.73, 45.50, 79.95, 66.22, 65.54, 43.51, 70.74),
    _table7(
        "RADIO ViT-H/14",
        "student",
        556,
        82.73,
        85.29,
        50.32,
        85.17,
        69.17,
        67.08,
        54.92,
        77.88,
        remark="the weights released after publication, with DFN CLIP among the teachers",
    ),
)
TABLE_8 = (
    _table8("SAM Base", "teacher", 75.78, 29.18),
    _table8("SAM Large", "teacher", 77.01, 13.52),
    _table8("SAM Huge", "teacher", 77.18, 8.56),
    _table8("RADIO ViTDet-H/14, window 8", "student", 75.17, 8.20),
    _table8("RADIO ViTDet-H/14, window 9", "student", 75.31, 8.04),
    _table8("RADIO ViTDet-H/14, window 18", "student", 75.42, 7.45),
)
TABLE_10 = (
    PaperRow(
        model="SAM ViTDet-H/16",
        kind="teacher",
        table="table 10",
        values={
            "knn": 22.39,
            "ade20k": 28.17,
            "voc": 32.16,
            "gqa": 57.62,
            "sqa": 63.26,
            "textvqa": 43.34,
            "vqav2": 60.00,
            "images_per_second": 16,
        },
    ),
)

ROWS: tuple[PaperRow, ...] = (*TABLE_3, *TABLE_6, *TABLE_7, *TABLE_8, *TABLE_10)

HEADLINE: tuple[PaperRow, ...] = (
    TABLE_7[-1],
    TABLE_8[-1],
)
"""The paper's best student in each of its two settings: the rows for a table over all tasks."""


def rows_for(task: str) -> tuple[PaperRow, ...]:
    """Return the paper's rows with a value for one of our tasks; empty for a task that it does not have."""
    columns = TASKS.get(task, ())
    return tuple(row for row in ROWS if any(name in row.values for name in columns))


def table_6_row(model: str) -> PaperRow | None:
    """Return the row of table 6 for one of our architectures or teachers, by its name without a file."""
    name = TABLE_6_MODELS.get(model.partition("@")[0])
    return next((row for row in TABLE_6 if row.model == name), None)
