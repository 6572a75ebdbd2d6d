"""Segmentation by the nearest patches of labelled images (Balažević et al. 2023, "Hummingbird")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.core.evaluator import EvalRun, Result
from evals.core.features import place
from evals.knn.index import load_faiss
from evals.seg_probe.areas import Bytes, score_labels
from evals.seg_probe.reading import open_checked
from radio.errors import DataError
from radio.resources import check_memory
from radio.types import Backbone

from . import DenseKnnSettings, choose_voc_split
from .memory import Encoder, Memory, check_fits, count_patches, fill

# Letters: B batch, T tokens, D token width, C classes, k neighbours, H W an image's own height and width.

_SIDE, _SCENES_SIDE = 512, 96
_BATCH = 16
_VOTES = 1024  # patches whose neighbours' labels are in memory at once
_DECIMALS = 10  # of votes in float64: equal ones are exactly equal, so that ties go to the lower class


def input_size(model: Backbone, settings: DenseKnnSettings) -> tuple[int, int]:
    """Return the size (height, width) that every image is stretched to."""
    side = settings.size or (_SCENES_SIDE if settings.data is None else _SIDE)
    return model.nearest_size(side, side)


def evaluate(model: Backbone, settings: DenseKnnSettings, run: EvalRun) -> Result:
    """Label the patches of the validation images by those of the training images.

    The tokens of the drawn training patches are cached, and the areas of the validation images.

    Raises:
        DataError: data in an unknown layout, or with an invalid file; names the first. Or no patch with a
            labelled pixel was drawn.
        SizeError: a memory that is larger than the machine's.
        MissingExtraError: FAISS is not installed.
        RadioError: tokens that are not finite.
    """
    load_faiss()  # fail early
    size = input_size(model, settings)
    data, _ = open_checked(settings.data, run, voc_split=choose_voc_split(settings), scenes=settings.scenes)
    classes, batch = data.labelling.classes, run.batch_size(_BATCH)
    check_memory(model, batch, size, run.device, run.dtype)
    encode = Encoder(place(model, run.device, run.dtype), size, run)
    grid = encode.grid
    counts = count_patches(len(data.train.pairs), settings.memory, grid[0] * grid[1])
    check_fits(sum(counts), model.token_dim, len(classes), compressed=settings.index == "compressed")
    key = [model.fingerprint, run.precision, size]
    memory = fill(encode, data, counts, key=key, batch=batch)
    if not len(memory.labels):
        raise DataError(
            f"no labelled patch was drawn from {data.train.name}; give a larger --memory than "
            f"{settings.memory:,}"
        )
    predict = Votes(encode, memory, settings)
    result = score_labels(
        data,
        predict,
        run,
        fit=lambda *_: size,
        batch=batch,
        key=["dense k-NN/1", memory.key, settings.k, settings.temperature, settings.index],
        label=f"{model.name} on {data.val.name}",
        parts=("train", "val"),
        save_maps=settings.save_maps,
        resolved={
            "size": list(size),
            "grid": list(grid),
            "memory": len(memory.labels),
            "patches_per_image": [min(counts), max(counts)],
        },
    )
    notes = []
    if settings.size not in (None, *size):
        notes.append(
            f"{settings.size} px was asked for; {model.name} takes {size[0]}x{size[1]}, which was used"
        )
    if data.train.name == "VOC2012/train":
        notes.append("the memory is of VOC2012's train; the published protocol takes SBD's trainaug")
    return replace(result, notes=[*notes, *result.notes])


@final
class Votes:
    """Labels images by the votes of the nearest patches in the memory, which is read at the first one."""

    def __init__(self, encode: Encoder, memory: Memory, settings: DenseKnnSettings) -> None:
        self._encode, self._memory, self._settings = encode, memory, settings

    def __call__(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Return the class of every pixel of images [B, 3, h, w], each [H, W] of its size."""
        tokens = self._encode(images)
        shares = self._vote(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])  # [B, T, C]
        planes = shares.transpose(1, 2).unflatten(2, self._encode.grid).to(self._encode.run.device)
        return [_upsample(plane, size) for plane, size in zip(planes, sizes, strict=True)]

    def _vote(self, tokens: Tensor) -> Tensor:
        """Compute the votes for each class: [B*T, D] -> [B*T, C] float32, each row the shares of a patch."""
        memory, labels = self._memory, self._memory.labels
        index = memory.exact if self._settings.index == "exact" else memory.compressed
        found = index.search(tokens, min(self._settings.k, len(labels)))
        pixels = self._encode.model.patch_size**2
        parts = []
        for similarities, ids in zip(found.similarities.split(_VOTES), found.ids.split(_VOTES), strict=True):
            weights = torch.softmax(similarities.double() / self._settings.temperature, dim=1)
            votes = torch.einsum("qk,qkc->qc", weights, labels[ids].double())
            parts.append((votes / pixels).round(decimals=_DECIMALS).float())
        return torch.cat(parts)


def _upsample(plane: Tensor, size: tuple[int, int]) -> Bytes:
    """Enlarge votes [C, h, w] bilinearly and take the class with most at every pixel: [H, W]."""
    votes = F.interpolate(plane.unsqueeze(0), size, mode="bilinear", align_corners=False)
    classes: Bytes = votes[0].argmax(dim=0).byte().cpu().numpy()
    return classes
