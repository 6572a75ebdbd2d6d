"""Our parts for MMSegmentation's registries: backbone, head, resize, metric. Import through `load_plugin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import ConfigDict
from mmseg.datasets import ADE20KDataset, PascalVOCDataset
from mmseg.evaluation import IoUMetric
from mmseg.models import CrossEntropyLoss, EncoderDecoder, SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS, TRANSFORMS
from numpy.typing import NDArray
from torch import Tensor, nn

from radio.dist import Ranks
from radio.errors import RadioError
from radio.resources import fast_products
from radio.types import Backbone

from .data import VOID
from .protocol import ProbeConfig, keep_ratio

# Letters: B batch, D token width, H W grid, h w pixels, C classes, N images.

Areas = NDArray[np.float64]
"""[N, 3, C]: pixels per image and class in the intersection, in the prediction and in the label."""

KNOWN_CLASSES: Mapping[str, Sequence[str]] = {
    "ADE20K": ADE20KDataset.METAINFO["classes"],
    "VOC2012": PascalVOCDataset.METAINFO["classes"],
}


@MODELS.register_module()
@final
class RadioBackbone(nn.Module):  # type: ignore[misc, unused-ignore]
    """Adapts our backbones to MMSegmentation: [B, 3, h, w] in [0, 1] -> one map [B, D, H, W].

    The model is not a submodule: the head's checkpoints do not contain its weights, and `train()` does not
    affect it.
    """

    def __init__(self, model: Backbone, dtype: torch.dtype) -> None:
        super().__init__()
        self._held, self._dtype = (model,), dtype

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Compute the tokens as a map, float32, without gradient.

        Raises:
            RadioError: when testing, some are not finite; in training the loss is checked instead.
        """
        testing = not torch.is_grad_enabled()
        with fast_products(images.device), torch.no_grad():
            maps = self._held[0](images.to(self._dtype)).map().float()
        if testing and not bool(torch.isfinite(maps).all()):
            raise RadioError(
                f"{self._held[0].name} gives tokens that are not finite; try --precision fp32, or look at "
                f"the training"
            )
        return (maps,)


@MODELS.register_module()
@final
class KeptTokens(nn.Module):
    """Replaces the backbone where its maps [B, D, H, W] come from the loader."""

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """Return the maps unchanged, as a tuple."""
        return (tokens,)


@final
class SharedBatchNorm(nn.Module):
    """Batch norm over the batches of all ranks, so that running statistics are equal on all ranks.

    The usual one would normalise each rank's share separately and save rank 0's statistics for all. The
    input comes from a frozen backbone and needs no gradient, so only sums must be exchanged between ranks
    (torch's SyncBatchNorm needs GPUs).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, group: Ranks, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self._group, self._eps, self._momentum = group, eps, momentum

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise each channel of [B, D, H, W] by this step's statistics, or by the running ones."""
        mean, variance = self._statistics(maps) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * (variance + self._eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), maps, scale.view(1, -1, 1, 1))

    @torch.no_grad()
    def _statistics(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        count = maps.numel() // maps.shape[1] * self._group.world  # equal on every rank
        mean = self._group.sum(maps.sum(dim=(0, 2, 3))) / count
        squares = (maps - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
        variance = self._group.sum(squares) / count
        self.running_mean.lerp_(mean, self._momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), self._momentum)
        return mean, variance


@MODELS.register_module()
@final
class LinearHead(BaseDecodeHead):  # type: ignore[misc]
    """Batch norm and a 1x1 convolution (the base class's `conv_seg`)."""

    def __init__(self, width: int, num_classes: int, group: Ranks) -> None:
        super().__init__(
            in_channels=width,
            channels=width,
            num_classes=num_classes,
            out_channels=num_classes,  # explicit, to avoid a warning with two classes
            dropout_ratio=0,
            ignore_index=VOID,
            align_corners=False,
            loss_decode={"type": CrossEntropyLoss, "avg_non_ignore": True},
        )
        self.bn = SharedBatchNorm(width, group)
        self._group = group

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute logits [B, C, H, W] from the last of the backbone's maps."""
        logits: Tensor = self.cls_seg(self.bn(self._transform_inputs(inputs)))
        return logits

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Compute the cross-entropy over the labelled pixels of all ranks.

        It is scaled by the number of ranks, since DDP averages gradients.
        """
        labels = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits, size=labels.shape[2:], mode="bilinear", align_corners=False)
        counted = self._group.sum((labels != VOID).sum())
        loss = self.loss_decode(
            logits,
            labels.squeeze(1),
            avg_factor=counted.clamp(min=1) / self._group.world,
            ignore_index=VOID,
        )
        return {"loss_ce": loss}


@TRANSFORMS.register_module()
@final
class FitResize(BaseTransform):  # type: ignore[misc]
    """Keep-ratio resize to the nearest size that the backbone takes, for testing on whole images."""

    def __init__(self, model: Backbone, long_side: int, short_side: int) -> None:
        self._nearest_size, self._long, self._short = model.nearest_size, long_side, short_side

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize `img` and update `img_shape` in the results."""
        height, width = self._nearest_size(*keep_ratio(results["img"].shape[:2], self._long, self._short))
        results["img"] = mmcv.imresize(results["img"], (width, height), interpolation="bilinear")
        results["img_shape"] = (height, width)
        return results


@final
class AreaMetric(IoUMetric):  # type: ignore[misc]
    """MMSegmentation's IoU metric that stores the areas of each image, in the order of the data set.

    Each rank has images rank, rank + world, ...: none is padded or counted twice, and nothing is pickled.
    """

    default_prefix = ""  # explicitly none, to avoid a warning

    def __init__(self, group: Ranks) -> None:
        super().__init__(ignore_index=VOID, iou_metrics=["mIoU"])
        self._group = group
        self.areas: Areas = np.empty((0, 3, 0))

    def evaluate(self, size: int) -> dict[str, float]:
        """Compute mIoU, mAcc and aAcc, rounded as by MMSegmentation; the same on every rank."""
        num_classes = len(self.dataset_meta["classes"])
        areas = torch.zeros(size, 3, num_classes, dtype=torch.float64)
        for index, (both, _, predicted, label) in enumerate(self.results):
            areas[self._group.rank + index * self._group.world] = torch.stack(
                [both, predicted, label]
            ).double()
        self.results.clear()
        areas = self._group.sum(areas)
        self.areas = areas.numpy()
        rows = [(both, predicted + label - both, predicted, label) for both, predicted, label in areas]
        scores: dict[str, float] = self.compute_metrics(rows)
        return scores


def build_model(
    model: Backbone, dtype: torch.dtype, config: ProbeConfig, num_classes: int, group: Ranks, *, cached: bool
) -> nn.Module:
    """Build an MMSegmentation `EncoderDecoder` from a backbone and our head.

    Args:
        cached: whether the loader gives the backbone's maps instead of images.
    """
    backbone: dict[str, Any] = {"type": KeptTokens}
    preprocessor: dict[str, Any] = {"size_divisor": 1}
    if not cached:
        backbone = {"type": RadioBackbone, "model": model, "dtype": dtype}
        # The backbone normalises its input: only BGR bytes -> RGB in [0, 1] and padding remain.
        preprocessor = {"mean": [0.0] * 3, "std": [255.0] * 3, "bgr_to_rgb": True, "size": config.crop}
        if config.slides:
            preprocessor["test_cfg"] = {"size": config.crop}
    test: dict[str, Any] = {"mode": "whole"}
    if config.slides:
        test = {"mode": "slide", "crop_size": config.crop, "stride": config.stride}
    head = {"type": LinearHead, "width": model.token_dim, "num_classes": num_classes, "group": group}
    built: nn.Module = MODELS.build(
        {
            "type": EncoderDecoder,
            "backbone": backbone,
            "decode_head": head,
            "data_preprocessor": {
                "type": SegDataPreProcessor,
                "pad_val": 0,
                "seg_pad_val": VOID,
                **preprocessor,
            },
            "test_cfg": ConfigDict(test),
        }
    )
    return built
