"""Training of the tiny scenes teachers: batches of generated scenes, and one loss per teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio.errors import require
from radio.resample import resize_images
from radio.scenes.language import TEMPLATES, caption
from radio.scenes.world import CLASSES, COLOURS, SHAPES, Scene, render
from radio.students.vit import ViT
from radio.teachers.sam_decoder import decode
from radio.teachers.scenes import Clip
from radio.teachers.scenes_sam import SIDE
from radio.teachers.scenes_text import tokenize

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
    watched: dict[str, Tensor]  # scalars, for the log


def lessons(
    first: int, count: int, batch: int, seed: int, generator: torch.Generator
) -> Iterator[SceneBatch]:
    """Yield batches of the train split from index `first` on, mirrored left to right at random."""
    for start in range(first, first + count - batch + 1, batch):
        indices = range(start, start + batch)
        scenes = [render(index, split="train", seed=seed, size=SIZE) for index in indices]
        said = tuple(
            caption(scene, i, split="train", seed=seed) for i, scene in zip(indices, scenes, strict=True)
        )
        yield _mirrored(gather(scenes, said), torch.rand(batch, generator=generator) < 0.5)


def gather(scenes: list[Scene], captions: tuple[str, ...]) -> SceneBatch:
    """Collate scenes into a batch."""
    known = np.full((len(scenes), _MAX_OBJECTS, 6), _ABSENT, dtype=np.int64)
    for row, scene in enumerate(scenes):
        for column, item in enumerate(scene.objects):
            known[row, column] = (item.colour, item.shape, *item.box)
    table = torch.from_numpy(known)
    return SceneBatch(
        images=torch.from_numpy(np.stack([scene.image for scene in scenes])).float() / 255,
        instances=torch.from_numpy(np.stack([scene.instances for scene in scenes])).long(),
        colours=table[..., 0],
        shapes=table[..., 1],
        boxes=table[..., 2:].float(),
        captions=captions,
    )


def _mirrored(lesson: SceneBatch, which: Tensor) -> SceneBatch:
    """Mirror the selected scenes; captions stay, since none mentions left or right."""
    x0, y0, x1, y1 = lesson.boxes.unbind(-1)
    boxes = torch.stack((SIZE - x1, y0, SIZE - x0, y1), dim=-1)
    return lesson._replace(
        images=torch.where(which[:, None, None, None], lesson.images.flip(-1), lesson.images),
        instances=torch.where(which[:, None, None], lesson.instances.flip(-1), lesson.instances),
        boxes=torch.where(which[:, None, None], boxes, lesson.boxes),
    )


def shares(lesson: SceneBatch, side: int) -> Tensor:
    """Compute each object's share of each cell of a g x g grid, background first: [B, 1 + O, g, g]."""
    planes = F.one_hot(lesson.instances, 1 + _MAX_OBJECTS).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(planes, side)


class DenseLesson(nn.Module):
    """Supervision of class token and patches; its heads are discarded after training."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit
        width = vit.token_dim
        self.tags = nn.Linear(width, len(CLASSES))
        self.main = nn.Linear(width, len(COLOURS) + len(SHAPES))
        self.cells = nn.Linear(width, len(COLOURS) + len(SHAPES) + 2)

    def forward(self, lesson: SceneBatch, progress: float) -> Loss:
        """Compute cross-entropies of area-weighted tags, of the main object, and of each cell's contents."""
        features = self.vit(resize_images(lesson.images, self.vit.native_size))
        parts = shares(lesson, features.grid[0])
        tags = F.cross_entropy(self.tags(features.summary), _tags(lesson, parts))
        colour, shape = self.main(features.summary).split([len(COLOURS), len(SHAPES)], dim=1)
        main = F.cross_entropy(colour, lesson.colours[:, 0]) + F.cross_entropy(shape, lesson.shapes[:, 0])
        watched = {"colour": _hits(colour, lesson.colours[:, 0]), "shape": _hits(shape, lesson.shapes[:, 0])}
        return Loss(tags + main + self._cells(features.tokens, lesson, parts), watched)

    def _cells(self, tokens: Tensor, lesson: SceneBatch, parts: Tensor) -> Tensor:
        """Compute the loss of each cell's colour and shape; pure background counts a fifth of an object."""
        weight = 0.2 + 0.8 * (1 - parts[:, 0].flatten(1))
        colour, shape = self.cells(tokens).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
        lost = _soft(colour, _contents(parts, lesson.colours, len(COLOURS))) + _soft(
            shape, _contents(parts, lesson.shapes, len(SHAPES))
        )
        return (weight * lost).sum() / weight.sum()


def _tags(lesson: SceneBatch, parts: Tensor) -> Tensor:
    """Compute the share of each class in the area of all objects: [B, classes]."""
    areas = parts[:, 1:].sum(dim=(2, 3))
    classes = (lesson.colours * len(SHAPES) + lesson.shapes).clamp(min=0)  # absent ones have no area
    spread = torch.zeros(len(areas), len(CLASSES)).scatter_add_(1, classes, areas)
    return spread / spread.sum(dim=1, keepdim=True)


def _contents(parts: Tensor, kinds: Tensor, count: int) -> Tensor:
    """Compute the share of each kind in each cell, background first: [B, g * g, 1 + count]."""
    of_object = F.one_hot(kinds.clamp(min=0) + 1, 1 + count).float()
    background = F.one_hot(torch.zeros(len(kinds), 1, dtype=torch.int64), 1 + count).float()
    return torch.einsum("bohw,bok->bhwk", parts, torch.cat((background, of_object), dim=1)).flatten(1, 2)


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1)


def _hits(logits: Tensor, wanted: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == wanted).float().mean()


class ClipLesson(nn.Module):
    """Contrastive loss of images and captions; in the first half also of regions and their names."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))
        self.contrast: Any = require("open_clip", extra="zeroshot").ClipLoss()
        self.register_buffer(
            "names", tokenize([TEMPLATES[0].format(name) for name in CLASSES]), persistent=False
        )

    def forward(self, lesson: SceneBatch, progress: float) -> Loss:
        """Compute the contrastive loss; `progress` in [0, 1) is the training's progress."""
        features = self.clip.image.vit(resize_images(lesson.images, self.clip.image.vit.native_size))
        images = F.normalize(self.clip.image.projection(features.summary), dim=-1)
        texts = F.normalize(self.clip.text(tokenize(lesson.captions)), dim=-1)
        names = F.normalize(self.clip.text(self.get_buffer("names")), dim=-1)
        classes = lesson.colours * len(SHAPES) + lesson.shapes
        scale = self.log_scale.exp().clamp(max=100.0)
        total = self._captions(images, texts, classes[:, 0], scale)
        if progress < 0.5:
            regions = self._regions(features.tokens, lesson, features.grid[0])
            total = total + F.cross_entropy(scale * regions @ names.T, classes[classes >= 0])
        return Loss(total, _named(images.detach() @ names.detach().T, classes[:, 0]))

    def _captions(self, images: Tensor, texts: Tensor, main: Tensor, scale: Tensor) -> Tensor:
        """Compute the loss in both directions; images with the same main object are not negatives."""
        towards_text, towards_image = self.contrast.get_logits(images, texts, scale)
        same = (main[:, None] == main[None]) & ~torch.eye(len(main), dtype=torch.bool)
        own = torch.arange(len(main))
        lost = [
            F.cross_entropy(logits.masked_fill(same, -torch.inf), own)
            for logits in (towards_text, towards_image)
        ]
        return (lost[0] + lost[1]) / 2

    def _regions(self, tokens: Tensor, lesson: SceneBatch, side: int) -> Tensor:
        """Compute each object's mean token in the shared space, normalised: [R, C]."""
        parts = shares(lesson, side)[:, 1:].flatten(2)
        pooled = (parts @ tokens) / parts.sum(dim=2, keepdim=True).clamp(min=1e-6)
        return F.normalize(self.clip.image.projection(pooled[lesson.colours >= 0]), dim=-1)


def _named(scores: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    found = scores.argmax(dim=1)
    return {
        "colour": (found // len(SHAPES) == wanted // len(SHAPES)).float().mean(),
        "shape": (found % len(SHAPES) == wanted % len(SHAPES)).float().mean(),
    }


class SamLesson(nn.Module):
    """Loss for a jittered box and a point per image; of each prompt's three masks the best is trained."""

    def __init__(self, sam: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.sam = sam
        self.generator = generator

    def forward(self, lesson: SceneBatch, progress: float) -> Loss:
        """Compute the best mask's focal and dice loss, and the IoUs' MSE (Kirillov et al. 2023, app. A)."""
        images = resize_images(lesson.images, (SIDE, SIDE)) * 255
        embeddings = self.sam.image_encoder((images - self.sam.pixel_mean) / self.sam.pixel_std)
        rows = torch.arange(len(images))
        boxed, pointed = self._pick(lesson.colours >= 0), self._pick(lesson.colours >= 0)
        boxes = self._jitter(lesson.boxes[rows, boxed])
        points = self._inside(lesson.instances == (pointed + 1)[:, None, None])
        zoom = SIDE / SIZE
        logits, quality = decode(
            self.sam, embeddings, rows.repeat(2), boxes=boxes * zoom, points=(points * zoom - 0.5)[:, None]
        )
        logits = F.interpolate(logits, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        wanted = torch.cat([lesson.instances == (column + 1)[:, None, None] for column in (boxed, pointed)])
        return _mask_loss(logits, quality, wanted.float(), len(rows))

    def _pick(self, present: Tensor) -> Tensor:
        """Sample one present object of each scene: [B]."""
        return torch.multinomial(present.float(), 1, generator=self.generator)[:, 0]

    def _jitter(self, boxes: Tensor) -> Tensor:
        """Jitter each coordinate by a tenth of the box's side (sd), at most 3 px."""
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        shift = torch.randn(boxes.shape, generator=self.generator) * 0.1 * sides
        return (boxes + shift.clamp(-3, 3)).clamp(0, SIZE)

    def _inside(self, masks: Tensor) -> Tensor:
        """Sample the centre of one pixel of each mask: [B, 2] as x, y."""
        pixel = torch.multinomial(masks.flatten(1).float(), 1, generator=self.generator)[:, 0]
        return torch.stack((pixel % SIZE, pixel // SIZE), dim=1) + 0.5


def _mask_loss(logits: Tensor, quality: Tensor, wanted: Tensor, num_boxes: int) -> Loss:
    """Compute the loss of logits [P, 3, H, W], masks [P, H, W]; the first `num_boxes` prompts are boxes."""
    target = wanted[:, None]
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    focal = (entropy * (target - chance) ** 2).mean(dim=(2, 3))
    overlap = (chance * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (chance.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    with torch.no_grad():
        drawn = logits > 0
        both, either = (drawn & (target > 0.5)).sum((2, 3)), (drawn | (target > 0.5)).sum((2, 3))
        iou = both / either.clamp(min=1)
    best = (20 * focal + dice).amin(dim=1).mean()
    chosen = iou.gather(1, quality.argmax(dim=1, keepdim=True))[:, 0]
    watched = {"box": chosen[:num_boxes].mean(), "point": chosen[num_boxes:].mean()}
    return Loss(best + F.mse_loss(quality, iou), watched)
