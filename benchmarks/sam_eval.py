"""Compare the speed of our SAM drop-in with a plain implementation.

On the same images, boxes and masks: ours against `SamPredictor` one box at a time, which scans all
annotations for each image and computes overlaps through run lengths. Runs alternate, in both orders, and the
medians are compared. A second pair measures the released decoder with random weights on one image.

    python benchmarks/sam_eval.py [--data instances_val2017.json --images val2017 --model runs/demo/ckpt.pt]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as library
from rich.console import Console
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from evals.core.evaluator import EvalRun, RunSettings
from evals.sam_dropin.annotations import CocoImage
from evals.sam_dropin.data import Instances, open_instances, run_lengths
from evals.sam_dropin.encoder import DropIn, make_drop_in
from evals.sam_dropin.masks import Prompts, default_prompt_batch, make_frame, predict_masks
from evals.sam_dropin.prediction import MaskScore, Predictor
from radio.hub import load_backbone
from radio.scenes.export import ScenesSettings, write_cached
from radio.teachers.sam import SamHead, new_released_sam
from radio.teachers.scenes import scenes_sam

WANTED = 1.3  # required speed-up, end to end


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Data, model and number of rounds of the benchmark."""

    data: Path | None = None
    """An instances JSON in COCO's format. Default: the generated world."""
    images: Path | None = None
    """The folder of its images."""
    model: str = "scenes:sam"
    """A student of scenes:sam, or scenes:sam itself."""
    num_images: int = 20
    boxes: int = 3
    """Minimum number of boxes per image."""
    rounds: int = 5
    threads: int = 2


class StandIn(nn.Module):
    """The drop-in as SAM's image encoder; its input is normalised by the predictor."""

    def __init__(self, drop_in: DropIn, sam: Any) -> None:
        super().__init__()
        self.drop_in, self.img_size = drop_in, drop_in.side
        self.mean, self.std = sam.pixel_mean / 255, sam.pixel_std / 255

    def forward(self, normalised: Tensor) -> Tensor:
        """Embed a normalised image: [1, 3, side, side] -> [1, C, h, w]."""
        return self.drop_in.embed(normalised * self.std + self.mean)


class PlainPredictor(SamPredictor):  # type: ignore[misc]
    """A predictor whose encoder takes another size than the frame of its prompts: 168 px against 112."""

    transform: Any

    def set_resized(self, image: NDArray[np.uint8], side: int) -> None:
        """Embed an image at `side`; prompts and masks stay in SAM's frame."""
        frame, self.transform = self.transform, ResizeLongestSide(side)
        self.set_image(image)
        self.transform = frame
        self.input_size = frame.get_preprocess_shape(*image.shape[:2], frame.target_length)


def plainly(drop_in: DropIn, data: Instances, images: Path) -> list[float]:
    """Compute the IoU of every annotation, one box at a time."""
    sam = scenes_sam()
    frame = drop_in.head.side
    sam.image_encoder = StandIn(drop_in, sam)
    predictor, found = PlainPredictor(sam), []
    predictor.transform.target_length = frame
    for image in data.images:
        predictor.set_resized(np.array(Image.open(images / image.name).convert("RGB")), drop_in.side)
        for instance in image.instances:
            sam.image_encoder.img_size = frame
            masks, quality, _ = predictor.predict(box=np.array(instance.box))
            sam.image_encoder.img_size = drop_in.side
            mask = library.encode(np.asfortranarray(masks[quality.argmax()].astype(np.uint8)))
            found.append(float(library.iou([mask], [run_lengths(instance, image.size)], [0])[0, 0]))
    return found


def ours(drop_in: DropIn, data: Instances) -> list[float]:
    """Compute the IoU of every annotation with the evaluator's `Predictor`, starting from an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        run = EvalRun(RunSettings(cache=Path(folder), device="cpu"), base="sam", folder=Path(folder))
        chunks = Predictor(drop_in, data, run).score_all(data.images, data.fingerprint, data.name)
        return [each.iou for chunk in chunks for each in chunk.records if isinstance(each, MaskScore)]


def full_size_plainly(sam: Any, embeddings: Tensor, image: CocoImage) -> list[NDArray[np.bool_]]:
    """Predict the masks of an image's boxes with `SamPredictor`, one at a time."""
    predictor = SamPredictor(sam)
    predictor.features, predictor.is_image_set = embeddings, True
    predictor.original_size = image.size
    predictor.input_size = make_frame(*image.size, 1024).inside
    found = []
    for instance in image.instances:
        masks, quality, _ = predictor.predict(box=np.array(instance.box))
        found.append(masks[quality.argmax()])
    return found


def full_size_ours(head: SamHead, embeddings: Tensor, image: CocoImage) -> list[Tensor]:
    """Predict the masks of an image's boxes in batches."""
    frame = make_frame(*image.size, head.side)
    boxes = torch.tensor([instance.box for instance in image.instances])
    prompts = Prompts(boxes=frame.points(boxes.view(-1, 2, 2)).reshape(-1, 4))
    image_index = torch.zeros(len(boxes), dtype=torch.int64)
    prompt_batch = default_prompt_batch(head, torch.device("cpu"))
    with torch.inference_mode():
        logits = predict_masks(head, embeddings, image_index, prompts, prompt_batch).logits
        return [frame.masks(part) > head.threshold for part in logits.split(prompt_batch)]


def in_turns(plain: Callable[[], object], batched: Callable[[], object], rounds: int) -> float:
    """Compute the ratio of the median seconds, plain / batched, of alternating runs in both orders."""
    laps: dict[Callable[[], object], list[float]] = {plain: [], batched: []}
    for number in range(rounds):
        for job in (plain, batched) if number % 2 else (batched, plain):
            start = time.perf_counter()
            job()
            laps[job].append(time.perf_counter() - start)
    return median(laps[plain]) / median(laps[batched])


def main(settings: Settings) -> int:
    """Print both ratios; return 1 when ours is less than `WANTED` times as fast end to end, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.data is not None and settings.images is not None:
            return compare(settings, settings.data, settings.images)
        world = Path(folder) / "world"
        write_cached(world, ScenesSettings(layout="coco", count=1), lambda reason: None)
        return compare(settings, world / "annotations" / "instances_val.json", world / "val")


def compare(settings: Settings, file: Path, images: Path) -> int:
    """Compare both ways on the images of a COCO file; return the exit code as `main`."""
    console = Console(highlight=False)
    torch.set_num_threads(settings.threads)
    data = open_instances(file, images, limit=None, crowds=True, smallest_area=0.0, memo=None)
    data.images = tuple(p for p in data.images if len(p.instances) >= settings.boxes)[: settings.num_images]
    drop_in = make_drop_in(load_backbone(settings.model), None, None, 0)
    by_plain = partial(plainly, drop_in, data, images)
    by_ours = partial(ours, drop_in, data)
    gap = max(abs(a - b) for a, b in zip(by_plain(), by_ours(), strict=True))
    console.print(f"{len(data.images)} images, {data.count} boxes, largest difference in IoU {gap:.2e}")
    ratio = in_turns(by_plain, by_ours, settings.rounds)
    console.print(f"end to end, {settings.model} and the scenes decoder: plain / ours {ratio:.2f}")

    sam = new_released_sam(1280).eval()
    embeddings = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    crowd = max(data.images, key=lambda image: len(image.instances))
    image = crowd._replace(instances=crowd.instances[:16])
    full = in_turns(
        partial(full_size_plainly, sam, embeddings, image),
        partial(full_size_ours, SamHead(sam, "random"), embeddings, image),
        max(1, settings.rounds // 2),
    )
    console.print(f"released decoder at full size, {len(image.instances)} boxes: plain / ours {full:.2f}")
    question = f"SAM drop-in, {len(data.images)} images, {data.count} boxes: `SamPredictor` box by box / ours"
    sys.stdout.write(f"| {question} | {ratio:.2f} | `python benchmarks/sam_eval.py` |\n")
    if ratio < WANTED:
        console.print(f"wanted {WANTED} or more end to end")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
