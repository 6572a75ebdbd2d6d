"""Compare the speed of our decoding and random crops with other loaders, on one core.

Each turns the same JPEG files into a batch uint8 [B, 3, side, side] with a RandomResizedCrop and a flip. The
files are made for the measurement, noise whose detail falls with its frequency, as in photographs, of 500 and
1,500 pixels, or your own (`--images`). The loaders take turns, and CPU time is compared, which other programs
disturb least. Last comes how far our pixels are from the exact crop: decoded in full, resized in float32.

    python benchmarks/loader.py [--rounds 7] [--quality 75] [--images FOLDER] [--side 224]

DALI's CPU pipeline takes part where it is installed (`pip install nvidia-dali-cuda120`); ffcv has no wheels.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import v2

from radio.entry import keep_freed_memory
from radio.images import decode, resize, sample_crop
from train.config import DataConfig
from train.data.crops import generator, random_view

WANTED = {500: 0.95, 1500: 1.1}  # at least this many times the speed of decode_jpeg + torchvision v2
OURS, REFERENCE = "radio-train", "decode_jpeg + torchvision v2"
ENDINGS = (".jpg", ".jpeg")

Loader = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Files, size of the crops and number of rounds."""

    images: Path | None = None
    """A folder of JPEGs instead of generated ones."""
    num_images: int = 24
    side: int = 224
    quality: int = 75
    """Of the generated JPEGs, as PIL counts it; 75 is its default."""
    rounds: int = 7


def photograph(width: int, quality: int, seed: int) -> bytes:
    """Make a JPEG of 4:3, noise of amplitude 1 / frequency^1.2."""
    height = width * 3 // 4
    noise = np.random.default_rng(seed).standard_normal((height, width, 3), dtype=np.float32)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # the mean
    image = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) / frequency[..., None] ** 1.2, axes=(0, 1))
    image = image[..., :1] + 0.3 * image  # the colours differ less than the brightness
    pixels = (118 + 50 * image / image.std()).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def ours(files: Sequence[bytes], side: int, numbers: Iterator[int]) -> Tensor:
    """Crop all files as the trainer's loader does."""
    return torch.stack([random_view(data, DataConfig(), side, 0, next(numbers)) for data in files])


def decode_and_v2(files: Sequence[bytes], transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Decode by torchvision's operator, crop by torchvision v2 in 8 bits."""
    buffers = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    return torch.stack([transform(torch.ops.image.decode_jpeg(data, 0, False)) for data in buffers])


def pil_and(files: Sequence[bytes], transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Decode by PIL, crop by a transform of PIL images, as timm's data sets do."""
    return torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])


def by_webdataset(shard: Path, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Read a shard by webdataset, decode by PIL, crop by torchvision."""
    data = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg")
    return torch.stack([transform(image) for (image,) in data])


def dali(files: Sequence[bytes], side: int) -> Loader:
    """Build DALI's pipeline on the CPU: a decoder that takes only the crop, bicubic resizing, a flip."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=len(files), num_threads=1, device_id=None, seed=0, prefetch_queue_depth=1
    )
    def pipeline() -> Any:
        data = fn.external_source(source=lambda: [np.frombuffer(file, np.uint8) for file in files])
        crops = fn.decoders.image_random_crop(data, device="cpu", random_area=[0.08, 1.0])
        crops = fn.resize(crops, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.transpose(fn.flip(crops, horizontal=fn.random.coin_flip()), perm=[2, 0, 1])

    built = pipeline()
    built.build()
    return lambda: built.run()[0].as_tensor()


def make_loaders(files: Sequence[bytes], side: int, folder: Path) -> dict[str, Loader]:
    """Build the loaders of the files."""
    crop = v2.RandomResizedCrop(side, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    tensors = v2.Compose([crop, v2.RandomHorizontalFlip()])
    images = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    timm = create_transform(
        side, is_training=True, color_jitter=0.0, interpolation="bicubic", normalize=False
    )
    shard = folder / f"{len(files[0])}.tar"
    with tarfile.open(shard, "w") as tar:
        for number, data in enumerate(files):
            member = tarfile.TarInfo(f"{number:04d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    loaders: dict[str, Loader] = {
        OURS: partial(ours, files, side, itertools.count()),
        REFERENCE: partial(decode_and_v2, files, tensors),
        "PIL + torchvision": partial(pil_and, files, images),
        "PIL + timm's transform": partial(pil_and, files, timm),
        "webdataset + torchvision": partial(by_webdataset, shard, images),
    }
    if importlib.util.find_spec("nvidia.dali"):
        loaders["DALI, CPU"] = dali(files, side)
    return loaders


def take_turns(loaders: dict[str, Loader], rounds: int) -> dict[str, float]:
    """Measure the median CPU seconds of each, alternating after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        torch.manual_seed(turn)
        for name, run in loaders.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


def differences(files: Sequence[bytes], side: int) -> tuple[float, float]:
    """Compute the mean and the largest difference of our crops from the exact ones, in levels of 255."""
    config, means, largest = DataConfig(flip=0.0), [], 0.0
    for number, data in enumerate(files):
        image = decode(data)
        height, width = image.shape[1:]
        box = sample_crop(height, width, config.crop_scale, config.crop_aspect, generator(0, "crop", number))
        cut = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        difference = (random_view(data, config, side, 0, number) - 255 * resize(cut, (side, side))).abs()
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    return sum(means) / len(means), largest


def main() -> int:
    """Print the tables; return 1 when ours is slower than required on generated images, else 0."""
    settings = tyro.cli(Settings, description=__doc__)
    console = Console(highlight=False)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands do
    if settings.images is None:
        sets = {
            f"{width} px": [photograph(width, settings.quality, seed) for seed in range(settings.num_images)]
            for width in WANTED
        }
    else:
        paths = sorted(path for path in settings.images.rglob("*") if path.suffix.lower() in ENDINGS)
        files = [path.read_bytes() for path in paths[: settings.num_images]]
        sets = {str(settings.images): [data for data in files if Image.open(io.BytesIO(data)).mode == "RGB"]}
    fine = True
    for name, files in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            times = take_turns(make_loaders(files, settings.side, Path(folder)), settings.rounds)
        kilobytes = sum(map(len, files)) / len(files) / 1000
        table = Table("loader", title=f"{name}, {kilobytes:.0f} kB on average, crops of {settings.side} px")
        for column in ("ms of CPU an image", f"{OURS} / this"):
            table.add_column(column, justify="right")
        for loader, seconds in times.items():
            table.add_row(loader, f"{1000 * seconds / len(files):.2f}", f"{seconds / times[OURS]:.2f}")
            if loader != OURS:
                row = f"loader, {name}: {loader} / ours | {seconds / times[OURS]:.2f}"
                sys.stdout.write(f"| {row} | `python benchmarks/loader.py` |\n")
        console.print(table)
        mean, largest = differences(files, settings.side)
        console.print(f"from the exact crop, in levels of 255: mean {mean:.2f}, at most {largest:.0f}\n")
        if settings.images is None:
            fine &= times[REFERENCE] / times[OURS] >= WANTED[int(name.split()[0])]
    return 0 if fine else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
