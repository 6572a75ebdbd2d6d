"""Our parts for MMSegmentation: backbone, head, metric, and samples of images or of cached token maps.

Import through `load_plugin`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose, RandomFlip, RandomResize, Resize
from mmengine.config import ConfigDict
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop
from mmseg.evaluation import IoUMetric
from mmseg.models import CrossEntropyLoss, EncoderDecoder, SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS, TRANSFORMS
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from evals.core.evaluator import EvalRun
from radio.chunks import (
    Tensors,
    TensorSpec,
    cached_chunks,
    chunk_path,
    load_tensors,
    read_tensors,
    write_tensors,
)
from radio.dist import Ranks
from radio.errors import RadioError
from radio.resources import fast_products
from radio.types import Backbone

from .areas import Areas
from .data import VOID, Labelling, Split, read_image, read_labels
from .protocol import ProbeConfig, Size, keep_ratio

# Letters: B batch, D token width, H W grid, h w pixels, C classes, N images.

Sample = dict[str, Any]  # MMSegmentation's {"inputs": Tensor, "data_samples": SegDataSample}

_META = ("img_path", "ori_shape", "img_shape", "index")
_BATCH = 32  # images per forward pass that computes token maps
CHUNK = 128  # images per file of token maps: the most that an interrupted run loses
_FORMAT = f"token maps/1 float16 in chunks of {CHUNK}"


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


@final
class Images(Dataset[Sample]):
    """Images of a split, with MMSegmentation's transforms.

    Args:
        training: resize and crop labels along with the image; else they keep their original size.
    """

    def __init__(
        self, split: Split, labelling: Labelling, config: ProbeConfig, model: Backbone, *, training: bool
    ) -> None:
        self._split, self._labelling, self._training = split, labelling, training
        self._transforms = Compose(_transforms(config, model, training))
        self._pack = PackSegInputs(_META)
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._split.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self._split.pairs[index]
        image = read_image(pair).numpy().transpose(1, 2, 0)
        results = {
            "img": np.ascontiguousarray(image[..., ::-1]),  # BGR, as the photometric distortion expects
            "img_path": str(pair.image),
            "img_shape": image.shape[:2],
            "ori_shape": image.shape[:2],
            "index": index,
            "seg_fields": ["gt_seg_map"],
        }
        labels = read_labels(pair.labels, self._labelling)
        if self._training:
            results["gt_seg_map"] = labels
        results = self._transforms(results)
        results.setdefault("gt_seg_map", labels)  # when testing, only now: the resize would change it
        sample: Sample = self._pack(results)
        return sample


@final
class TokenMaps(Dataset[Sample]):
    """The backbone's token maps of stretched images, with their labels."""

    def __init__(
        self, maps: Tensor, split: Split, labelling: Labelling, config: ProbeConfig, *, training: bool
    ) -> None:
        self._maps, self._split, self._labelling = maps, split, labelling  # [N, D, H, W]
        self._crop, self._training = config.crop, training
        self._pack = PackSegInputs(_META)
        self._labels: dict[int, NDArray[np.uint8]] = {}
        self.metainfo = {"classes": labelling.classes}

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, index: int) -> Sample:
        labels = self._read(index)
        results = {
            "img_path": str(self._split.pairs[index].image),
            "img_shape": self._crop,
            "ori_shape": labels.shape,
            "index": index,
            "gt_seg_map": labels,
        }
        return {**self._pack(results), "inputs": self._maps[index].float()}

    def _read(self, index: int) -> NDArray[np.uint8]:
        if index not in self._labels:  # kept: small beside the token map, a byte per pixel
            labels = read_labels(self._split.pairs[index].labels, self._labelling)
            if self._training and labels.shape != self._crop:
                labels = mmcv.imresize(labels, self._crop[::-1], interpolation="nearest")
            self._labels[index] = labels
        return self._labels[index]


def _transforms(config: ProbeConfig, model: Backbone, training: bool) -> list[Any]:
    scale = (config.long_side, config.short_side)
    if config.resize == "stretch":
        height, width = config.crop
        return [Resize((width, height), keep_ratio=False)]
    if training:
        return [
            RandomResize(scale, ratio_range=(0.5, 2.0), keep_ratio=True),
            RandomCrop(config.crop, cat_max_ratio=0.75, ignore_index=VOID),
            RandomFlip(prob=0.5),
            PhotoMetricDistortion(),
        ]
    return [Resize(scale, keep_ratio=True) if config.slides else FitResize(model, *scale)]


def one_thread(worker: int) -> None:
    """Disable OpenCV's threads in a loader's worker: they compete with other workers or hang after a fork."""
    cv2.setNumThreads(0)


def map_size(model: Backbone, crop: Size, run: EvalRun) -> int:
    """Compute the bytes of an image's cached map, from one forward pass of a grey image."""
    grey = torch.full((1, 3, *crop), 0.5, device=run.device, dtype=run.dtype)
    with torch.no_grad():
        return 2 * model(grey).tokens.numel()


def token_maps(model: Backbone, images: Images, run: EvalRun, *, key: Sequence[object], label: str) -> Tensor:
    """Compute or load from the cache the maps of stretched images: [N, D, H, W] float16 on the CPU.

    Args:
        key: everything that determines the maps.
        label: of the progress bar.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: tokens that are not finite in float16.
    """
    folder = run.cache / "token-maps" / hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()
    spans = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    batch_size = run.batch_size(_BATCH)

    def read(path: Path) -> Tensors:
        count = len(spans[int(path.stem)])
        return read_tensors(path, {"maps": TensorSpec(torch.float16, (count, model.token_dim, None, None))})

    def make(missing: list[int]) -> None:
        with run.progress(label, sum(len(spans[number]) for number in missing)) as advance:
            for number in missing:
                loader: DataLoader[Any] = DataLoader(
                    Subset(images, spans[number]),
                    batch_size=batch_size,
                    num_workers=run.workers,
                    collate_fn=_stack,
                    worker_init_fn=one_thread,
                    pin_memory=run.device.type == "cuda",
                )
                parts = []
                for pixels in loader:
                    parts.append(_encode(model, pixels.to(run.device, non_blocking=True), run.dtype))
                    advance(len(pixels))
                write_tensors(chunk_path(folder, number), {"maps": torch.cat(parts)})

    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    return torch.cat([load_tensors(path, ["maps"]).tensors["maps"] for path in paths])


def _encode(model: Backbone, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode BGR bytes [B, 3, h, w] as maps [B, D, H, W]."""
    with fast_products(images.device), torch.no_grad():
        maps = model((images[:, [2, 1, 0]].float() / 255).to(dtype)).map().half().cpu()
    if not bool(torch.isfinite(maps).all()):
        raise RadioError(
            f"{model.name} gives tokens that are not finite in half precision; try --precision fp32 with "
            f"--no-keep-tokens, or look at the training"
        )
    return maps.contiguous()


def _stack(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["inputs"] for sample in samples])
