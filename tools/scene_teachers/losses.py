"""Batches of generated scenes with all their labels, and the loss that trains each of the scenes teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio.errors import require
from radio.ops import resize_images
from radio.scenes.drawing import SHAPES
from radio.scenes.language import TEMPLATES, caption
from radio.scenes.world import CLASSES, COLOURS, Scene, render
from radio.students.vit import ViT
from radio.teachers.sam import decode
from radio.teachers.scenes import SIDE, Clip, tokenize

# Letters: B scenes, O objects (4 per scene, absent ones included), R present objects, P prompts,
# C summary width, g grid side.

SIZE = 96
_MAX_OBJECTS = 4
_ABSENT = -1


class SceneBatch(NamedTuple):
    """One batch of scenes with all labels."""

    images: Tensor  # [B, 3, 96, 96] in [0, 1]
    instances: Tensor  # [B, 96, 96] int64, 0 is background
    colours: Tensor  # [B, O] int64, -1 where there is no object; the first is the main one
    shapes: Tensor  # [B, O]
    boxes: Tensor  # [B, O, 4] x0 y0 x1 y1, half-open, in pixels of 96
    captions: tuple[str, ...]


class Loss(NamedTuple):
    """The loss to minimise, and accuracies for the log."""

    total: Tensor
    accuracies: dict[str, Tensor]  # scalars


def scene_batches(
    first: int, count: int, batch_size: int, seed: int, generator: torch.Generator
) -> Iterator[SceneBatch]:
    """Yield batches of the train split from index `first` on, mirrored left to right at random."""
    for start in range(first, first + count - batch_size + 1, batch_size):
        indices = range(start, start + batch_size)
        scenes = [render(index, split="train", seed=seed, size=SIZE) for index in indices]
        captions = [caption(s, i, split="train", seed=seed) for i, s in zip(indices, scenes, strict=True)]
        yield mirror(collate(scenes, captions), torch.rand(batch_size, generator=generator) < 0.5)


def collate(scenes: Sequence[Scene], captions: Sequence[str]) -> SceneBatch:
    """Collate scenes into a batch."""
    objects = np.full((len(scenes), _MAX_OBJECTS, 6), _ABSENT, dtype=np.int64)
    for row, scene in enumerate(scenes):
        for column, item in enumerate(scene.objects):
            objects[row, column] = (item.colour, item.shape, *item.box)
    table = torch.from_numpy(objects)
    return SceneBatch(
        images=torch.from_numpy(np.stack([scene.image for scene in scenes])).float() / 255,
        instances=torch.from_numpy(np.stack([scene.instances for scene in scenes])).long(),
        colours=table[..., 0],
        shapes=table[..., 1],
        boxes=table[..., 2:].float(),
        captions=tuple(captions),
    )


def mirror(batch: SceneBatch, mask: Tensor) -> SceneBatch:
    """Mirror the scenes of a mask [B]; captions stay, since none mentions left or right."""
    x0, y0, x1, y1 = batch.boxes.unbind(-1)
    boxes = torch.stack((SIZE - x1, y0, SIZE - x0, y1), dim=-1)
    return batch._replace(
        images=torch.where(mask[:, None, None, None], batch.images.flip(-1), batch.images),
        instances=torch.where(mask[:, None, None], batch.instances.flip(-1), batch.instances),
        boxes=torch.where(mask[:, None, None], boxes, batch.boxes),
    )


def cell_shares(batch: SceneBatch, side: int) -> Tensor:
    """Compute each object's share of each cell of a g x g grid, background first: [B, 1 + O, g, g]."""
    planes = F.one_hot(batch.instances, 1 + _MAX_OBJECTS).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(planes, side)


def class_shares(shares: Tensor, batch: SceneBatch) -> Tensor:
    """Compute the share of each class in the area of all objects: [B, classes]."""
    areas = shares[:, 1:].sum(dim=(2, 3))
    classes = (batch.colours * len(SHAPES) + batch.shapes).clamp(min=0)  # absent ones have no area
    sums = torch.zeros(len(areas), len(CLASSES)).scatter_add_(1, classes, areas)
    return sums / sums.sum(dim=1, keepdim=True)


def cell_contents(shares: Tensor, kinds: Tensor, count: int) -> Tensor:
    """Compute the share of each kind (of `count`) in each cell, background first: [B, g * g, 1 + count]."""
    of_object = F.one_hot(kinds.clamp(min=0) + 1, 1 + count).float()
    background = F.one_hot(torch.zeros(len(kinds), 1, dtype=torch.int64), 1 + count).float()
    return torch.einsum("bohw,bok->bhwk", shares, torch.cat((background, of_object), dim=1)).flatten(1, 2)


class DenseLoss(nn.Module):
    """Supervision of class token and patches; its heads are discarded after training."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit
        width = vit.token_dim
        self.tags = nn.Linear(width, len(CLASSES))
        self.main = nn.Linear(width, len(COLOURS) + len(SHAPES))
        self.cells = nn.Linear(width, len(COLOURS) + len(SHAPES) + 2)

    def forward(self, batch: SceneBatch, progress: float) -> Loss:
        """Compute cross-entropies of area-weighted tags, of the main object, and of each cell's contents."""
        features = self.vit(resize_images(batch.images, self.vit.native_size))
        shares = cell_shares(batch, features.grid[0])
        tags = F.cross_entropy(self.tags(features.summary), class_shares(shares, batch))
        colour, shape = self.main(features.summary).split([len(COLOURS), len(SHAPES)], dim=1)
        main = F.cross_entropy(colour, batch.colours[:, 0]) + F.cross_entropy(shape, batch.shapes[:, 0])
        accuracies = {
            "colour": (colour.detach().argmax(dim=1) == batch.colours[:, 0]).float().mean(),
            "shape": (shape.detach().argmax(dim=1) == batch.shapes[:, 0]).float().mean(),
        }
        return Loss(tags + main + self._cell_loss(features.tokens, batch, shares), accuracies)

    def _cell_loss(self, tokens: Tensor, batch: SceneBatch, shares: Tensor) -> Tensor:
        """Compute the loss of each cell's colour and shape; pure background counts a fifth of an object."""
        weight = 0.2 + 0.8 * (1 - shares[:, 0].flatten(1))
        colour, shape = self.cells(tokens).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
        loss = _soft_cross_entropy(colour, cell_contents(shares, batch.colours, len(COLOURS)))
        loss = loss + _soft_cross_entropy(shape, cell_contents(shares, batch.shapes, len(SHAPES)))
        return (weight * loss).sum() / weight.sum()


def _soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1)


class ClipLoss(nn.Module):
    """Contrastive loss of images and captions; in the first half also of regions and their names."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))
        self.contrast: Any = require("open_clip", extra="zeroshot").ClipLoss()
        names = tokenize([TEMPLATES[0].format(name) for name in CLASSES])
        self.register_buffer("names", names, persistent=False)

    def forward(self, batch: SceneBatch, progress: float) -> Loss:
        """Compute the contrastive loss; `progress` in [0, 1) is the training's progress."""
        features = self.clip.image.vit(resize_images(batch.images, self.clip.image.vit.native_size))
        images = F.normalize(self.clip.image.projection(features.summary), dim=-1)
        texts = F.normalize(self.clip.text(tokenize(batch.captions)), dim=-1)
        names = F.normalize(self.clip.text(self.get_buffer("names")), dim=-1)
        classes = batch.colours * len(SHAPES) + batch.shapes
        main = classes[:, 0]
        scale = self.log_scale.exp().clamp(max=100.0)
        total = self.caption_loss(images, texts, main, scale)
        if progress < 0.5:
            regions = self._regions(features.tokens, batch, features.grid[0])
            total = total + F.cross_entropy(scale * regions @ names.T, classes[classes >= 0])
        predicted = (images.detach() @ names.detach().T).argmax(dim=1)
        accuracies = {
            "colour": (predicted // len(SHAPES) == main // len(SHAPES)).float().mean(),
            "shape": (predicted % len(SHAPES) == main % len(SHAPES)).float().mean(),
        }
        return Loss(total, accuracies)

    def caption_loss(self, images: Tensor, texts: Tensor, main: Tensor, scale: Tensor) -> Tensor:
        """Compute the loss in both directions; images with the same main object are not negatives."""
        towards_text, towards_image = self.contrast.get_logits(images, texts, scale)
        same = (main[:, None] == main[None]) & ~torch.eye(len(main), dtype=torch.bool)
        own = torch.arange(len(main))
        losses = [
            F.cross_entropy(logits.masked_fill(same, -torch.inf), own)
            for logits in (towards_text, towards_image)
        ]
        return (losses[0] + losses[1]) / 2

    def _regions(self, tokens: Tensor, batch: SceneBatch, side: int) -> Tensor:
        """Compute each object's mean token in the shared space, normalised: [R, C]."""
        shares = cell_shares(batch, side)[:, 1:].flatten(2)
        pooled = (shares @ tokens) / shares.sum(dim=2, keepdim=True).clamp(min=1e-6)
        return F.normalize(self.clip.image.projection(pooled[batch.colours >= 0]), dim=-1)


class SamLoss(nn.Module):
    """Loss for a jittered box and a point per image; of each prompt's three masks the best is trained."""

    def __init__(self, sam: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.sam = sam
        self.generator = generator

    def forward(self, batch: SceneBatch, progress: float) -> Loss:
        """Compute the best mask's focal and dice loss, and the IoUs' MSE (Kirillov et al. 2023, app. A)."""
        images = resize_images(batch.images, (SIDE, SIDE)) * 255
        embeddings = self.sam.image_encoder((images - self.sam.pixel_mean) / self.sam.pixel_std)
        rows = torch.arange(len(images))
        boxed, pointed = self._sample_object(batch), self._sample_object(batch)  # for a box, for a point
        boxes = self._jitter(batch.boxes[rows, boxed])
        points = self._sample_pixel(batch.instances == (pointed + 1)[:, None, None])
        zoom = SIDE / SIZE
        logits, quality = decode(
            self.sam, embeddings, rows.repeat(2), boxes=boxes * zoom, points=(points * zoom - 0.5)[:, None]
        )
        logits = F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        masks = torch.cat([batch.instances == (column + 1)[:, None, None] for column in (boxed, pointed)])
        return mask_loss(logits, quality, masks.float(), len(rows))

    def _sample_object(self, batch: SceneBatch) -> Tensor:
        """Sample one present object of each scene: [B]."""
        return torch.multinomial((batch.colours >= 0).float(), 1, generator=self.generator)[:, 0]

    def _jitter(self, boxes: Tensor) -> Tensor:
        """Jitter each coordinate by a tenth of the box's side (sd), at most 3 px."""
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        shift = torch.randn(boxes.shape, generator=self.generator) * 0.1 * sides
        return (boxes + shift.clamp(-3, 3)).clamp(0, SIZE)

    def _sample_pixel(self, masks: Tensor) -> Tensor:
        """Sample the centre of one pixel of each mask: [B, 2] as x, y."""
        pixel = torch.multinomial(masks.flatten(1).float(), 1, generator=self.generator)[:, 0]
        return torch.stack((pixel % SIZE, pixel // SIZE), dim=1) + 0.5


def mask_loss(logits: Tensor, quality: Tensor, masks: Tensor, num_boxes: int) -> Loss:
    """Compute the loss of logits [P, 3, H, W], masks [P, H, W]; the first `num_boxes` prompts are boxes."""
    target = masks[:, None]
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    focal = (entropy * (target - chance) ** 2).mean(dim=(2, 3))
    overlap = (chance * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (chance.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    with torch.no_grad():
        predicted, true = logits > 0, target > 0.5
        iou = (predicted & true).sum((2, 3)) / (predicted | true).sum((2, 3)).clamp(min=1)
    best = (20 * focal + dice).amin(dim=1).mean()
    chosen = iou.gather(1, quality.argmax(dim=1, keepdim=True))[:, 0]
    accuracies = {"box": chosen[:num_boxes].mean(), "point": chosen[num_boxes:].mean()}
    return Loss(best + F.mse_loss(quality, iou), accuracies)
