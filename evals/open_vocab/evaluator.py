"""Segmentation by class names: the class whose text is nearest to a patch, averaged over crops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.core.evaluator import EvalRun, Result
from evals.core.features import check_finite, place
from evals.seg_probe.areas import Bytes, score_labels
from evals.seg_probe.classes import COCO_STUFF
from evals.seg_probe.data import Labelling
from evals.seg_probe.reading import open_checked
from evals.zeroshot.data import read_names, read_templates
from evals.zeroshot.texts import TextHead, classifier, find_text_tower
from radio.errors import ConfigError, DataError, SizeError, require
from radio.images import cover
from radio.resources import check_memory, fast_products
from radio.types import Backbone, find_adaptor

from . import OpenVocabSettings

# Letters: B batch, D token width, E text width, K named classes, N crops, H W an image's own height and
# width, or a crop's grid of tokens, h w at which the model sees it, s side of a crop.

_SHORT_SIDE, _SCENES_SIDE = 448, 96
_BATCH = 16  # crops
_SPOKEN = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
_KINDS = re.compile(r"-(other|stuff)$")  # of COCO-Stuff's names

Size = tuple[int, int]


def missing_requirements(model: Backbone) -> str:
    """Explain why the model's tokens cannot be compared with texts; empty if they can, by whichever head."""
    try:
        text = find_text_tower(model)
        if text.head is None or not _takes_tokens(text):
            choose_head(model, text, None)
    except ConfigError as error:
        return str(error)
    return ""


def choose_head(model: Backbone, text: TextHead, head: str | None) -> str:
    """Return how a model's tokens are led into the texts' space: `summary`, `spatial`, or `own`.

    Raises:
        ConfigError: they cannot be; or a head of a model that has no adaptor.
    """
    if text.head is None:
        if head is not None:
            raise ConfigError(f"{model.name} is compared with its own texts; leave --head {head} out")
        if not _takes_tokens(text):
            raise ConfigError(
                f"the tokens of {model.name} are not in the space of its texts, as its summary is; score a "
                f"student that learned from it"
            )
        return "own"
    chosen = head or "summary"
    summary, spatial = model.summary_tokens > 0, _takes_tokens(text)
    if chosen == "summary" and not summary:
        raise ConfigError(
            f"the tokens of {model.name} are not in the space of its summary (a neck makes them, or a "
            f"pooling lies between), so its summary's head does not fit them; "
            + ("give --head spatial" if spatial else f"nor does {text.teacher} compare its tokens with texts")
        )
    if chosen == "spatial" and not spatial:
        raise ConfigError(
            f"the tokens of {text.teacher} are not in the space of its texts, as its summary is; "
            + ("give --head summary" if summary else "score another student")
        )
    return chosen


def _takes_tokens(text: TextHead) -> bool:
    return bool(getattr(text.tower, "takes_tokens", False))  # another package's tower may lack it


class Crops(NamedTuple):
    """How an image is seen."""

    size: Size  # (height, width) of a crop in pixels
    stride: int
    short_side: int

    def fit(self, height: int, width: int) -> Size:
        """Return the size that an image of this height and width is resized to."""
        return cover(height, width, (self.short_side, self.short_side))


def choose_crops(model: Backbone, settings: OpenVocabSettings) -> Crops:
    """Return the crops of a model.

    Raises:
        SizeError: a stride that leaves pixels unseen.
    """
    short = settings.short_side or (_SCENES_SIDE if settings.data is None else _SHORT_SIDE)
    side = settings.crop or min(*model.native_size, short)
    size = model.nearest_size(side, side)
    stride = settings.stride or max(1, min(size) // 2)
    if stride > min(size):
        raise SizeError(
            f"a stride of {stride} px leaves pixels between crops of {size[0]}x{size[1]} unseen; give "
            f"{min(size)} or less"
        )
    return Crops(size, stride, max(short, *size))


def crop_size(model: Backbone, settings: OpenVocabSettings) -> Size:
    """Return the size (height, width) of a model's crops; see `choose_crops`."""
    return choose_crops(model, settings).size


def evaluate(model: Backbone, settings: OpenVocabSettings, run: EvalRun) -> Result:
    """Label the validation images by the texts of the classes; their areas are cached.

    Raises:
        ConfigError: a model without a text tower, or whose tokens are not in its space; or a background where
            the data have none.
        CheckpointError: the text tower's weights are not at the path in the checkpoint.
        DataError: data in an unknown layout, with an invalid file, or names that do not match the classes.
        SizeError: a stride that leaves pixels unseen.
        RadioError: a name that the text tower cannot encode, or tokens that are not finite.
    """
    require("open_clip", extra="zeroshot")  # raises here rather than after the check of the data
    text = find_text_tower(model, settings.text)
    head, crops = choose_head(model, text, settings.head), choose_crops(model, settings)
    batch = run.batch_size(_BATCH)
    check_memory(model, batch, crops.size, run.device, run.dtype)
    data, _ = open_checked(
        settings.data,
        run,
        scenes=(1, settings.scenes),
        layout=settings.layout,
        parts=("val",),
        background=settings.background is not None,
    )
    labelling = data.labelling
    if settings.background is not None and not labelling.has_background:
        raise ConfigError(
            f"--background {settings.background}: {data.val.name} has no class called background; leave it "
            f"out"
        )
    names = name_classes(labelling, settings.class_names)
    templates = read_templates(settings.templates, scenes=settings.data is None)
    columns = classifier(text.tower, names, templates, run)
    encode = make_encoder(place(model, run.device, run.dtype), text, head, run)
    threshold = settings.background

    def predict(images: Tensor, sizes: Sequence[Size]) -> list[Bytes]:
        cosines = average_crops(images[0].to(run.device), crops, lambda x: encode(x, columns), batch)
        plane = F.interpolate(cosines.unsqueeze(0), sizes[0], mode="bilinear", align_corners=False)[0]
        return [label_pixels(plane, int(labelling.has_background), threshold, settings.temperature)]

    return score_labels(
        data,
        predict,
        run,
        fit=crops.fit,
        batch=1,
        key=[
            *("open vocabulary/1", model.fingerprint, run.precision, text.head, head, crops),
            *(text.tower.fingerprint, names, templates, threshold, threshold and settings.temperature),
        ],
        label=f"{model.name} on {data.val.name}",
        parts=("val",),
        save_maps=settings.save_maps,
        resolved={
            "features": "own tokens" if head == "own" else f"tokens through {text.head}'s {head} head",
            "text": text.teacher,
            "templates": len(templates),
            "crop": list(crops.size),
            "stride": crops.stride,
            "short_side": crops.short_side,
        },
    )


def name_classes(labelling: Labelling, file: str | None) -> tuple[str, ...]:
    """Return a name for each class but the background: those of a file, or the data set's as words.

    Raises:
        DataError: a file with more or fewer names, or two classes of one name.
    """
    classes = labelling.classes[int(labelling.has_background) :]
    plain = [_KINDS.sub("", name) for name in classes] if labelling.classes == COCO_STUFF else classes
    words = tuple(_SPOKEN.get(name, name.replace("-", " ")) for name in plain)
    names = words if file is None else read_names(file)
    if len(names) != len(classes):
        raise DataError(
            f"{file}: has {len(names)} names, and there are {len(classes)} classes beside the background, "
            f"from {classes[0]} to {classes[-1]}; give one a line, in this order"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{file or 'the classes'}: {twice[0]!r} names more than one class, so that no text tells them "
            f"apart; give each a name of its own, in a file for --class-names"
        )
    return names


Encode = Callable[[Tensor, Tensor], Tensor]
"""Maps crops [N, 3, s, s] and class vectors [E, K] to the cosines of their tokens [N, K, H, W]."""


def make_encoder(model: Backbone, text: TextHead, head: str, run: EvalRun) -> Encode:
    """Return the function that compares a model's tokens with texts; the model is on its device."""

    def encode(images: Tensor, columns: Tensor) -> Tensor:
        with fast_products(run.device), torch.no_grad():
            features = model(images.to(run.dtype))
            tokens = features.tokens
            if head == "spatial":
                tokens = find_adaptor(model, str(text.head))(features).tokens
            elif head == "summary":
                # As if each token were the class token; where there are several, as if it were all of them.
                rows = tokens.flatten(0, 1).repeat(1, model.summary_tokens)
                adapted = find_adaptor(model, str(text.head)).adapt_summary(rows)
                tokens = adapted.unflatten(0, tokens.shape[:2])
        projected = text.tower.project(tokens.flatten(0, 1).float().cpu())
        check_finite(projected, f"{model.name} in the space of {text.teacher}'s texts")
        units = F.normalize(projected.to(run.device), dim=1)
        cosines = (units @ columns.to(run.device)).unflatten(0, tokens.shape[:2])
        maps: Tensor = cosines.transpose(1, 2).unflatten(2, features.grid)
        return maps

    return encode


def average_crops(image: Tensor, crops: Crops, encode: Callable[[Tensor], Tensor], batch: int) -> Tensor:
    """Average what overlapping crops give for each pixel: [3, h, w] -> [K, h, w].

    Args:
        encode: crops [N, 3, s, s] -> their values on a grid [N, K, H, W], which are enlarged bilinearly.
        batch: crops at once.
    """
    height, width = crops.size
    places = [
        (top, left)
        for top in starts(image.shape[1], height, crops.stride)
        for left in starts(image.shape[2], width, crops.stride)
    ]
    total, count = torch.zeros(()), torch.zeros(image.shape[1:], device=image.device)
    for start in range(0, len(places), batch):
        some = places[start : start + batch]
        cut = torch.stack([image[:, y : y + height, x : x + width] for y, x in some])
        values = F.interpolate(encode(cut), crops.size, mode="bilinear", align_corners=False)
        if start == 0:
            total = values.new_zeros(values.shape[1], *image.shape[1:])
        for (y, x), each in zip(some, values, strict=True):
            total[:, y : y + height, x : x + width] += each
            count[y : y + height, x : x + width] += 1
    return total / count


def starts(length: int, side: int, stride: int) -> list[int]:
    """Return where crops along an axis begin: every `stride` pixels, the last one at the image's end."""
    return [min(start, length - side) for start in range(0, length - side + stride, stride)]


def label_pixels(cosines: Tensor, first: int, threshold: float | None, temperature: float) -> Bytes:
    """Return the class of every pixel, [K, H, W] -> [H, W]; of equal ones the first.

    Args:
        first: the number of the first named class; 1 where the background is 0.
        threshold: a pixel whose highest probability is below is background; None: no pixel is.
        temperature: of the softmax over the cosines.
    """
    classes = cosines.argmax(dim=0) + first
    if threshold is not None:
        highest = (cosines.double() / temperature).softmax(dim=0).amax(dim=0)
        classes = classes.masked_fill(highest < threshold, 0)
    found: Bytes = classes.byte().cpu().numpy()
    return found
