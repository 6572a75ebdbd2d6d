"""Images with depth: the generated world, and NYU Depth V2 in the layout in which it is shared."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from radio.data import ImageSource, SceneImages
from radio.errors import DataError, MissingDataError, shown
from radio.image_files import Entry, Listing, StoredImages, as_text, spread
from radio.images import open_image
from radio.io import lines_of, read_text
from radio.ops import resize_images
from radio.progress import ProgressFactory, no_progress
from radio.scenes import Split as WorldSplit
from radio.scenes import depth as scene_depth

# Letters: N images, H W an image's own height and width, h w the encoder's input.

Size = tuple[int, int]  # (height, width)

NYU_SIZE: Size = (480, 640)
EIGEN_CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns of an NYU image that are scored (Eigen et al., arXiv 1406.2283, as all later work)."""

TRAIN_CROP: Size = (416, 544)
SCENE_SIZE: Size = (96, 96)
_NYU_CROP = (slice(45, 472), slice(43, 608))  # without the white frame, from which training crops are taken
_MILLIMETRES = 1000
_DEPTH_MODES = ("I;16", "I;16B", "I")
_PLACES = {"train": ("", "sync", "train"), "test": ("", "official_splits/test", "test")}  # below the root


@dataclass(frozen=True)
class DepthSplit:
    """Images of a training or test split, and the depth of each."""

    images: ImageSource
    read_depth: Callable[[int], Tensor]  # of an image's index: [H, W] in metres, 0 = unknown; or DataError
    depth_fingerprint: Callable[[], str]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of images and depths."""
        return hashlib.sha256(f"{self.images.fingerprint} {self.depth_fingerprint()}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.images.keys)


def scene_split(split: WorldSplit, count: int, seed: int) -> DepthSplit:
    """Make a split of the generated world."""
    draw = partial(scene_depth, split=split, seed=seed, size=SCENE_SIZE[0])

    def fingerprint() -> str:  # in case the generator changes
        drawn = b"".join(draw(index).tobytes() for index in range(min(count, 8)))
        return hashlib.sha256(drawn).hexdigest()

    images = SceneImages(split, count=count, seed=seed, size=SCENE_SIZE[0])
    return DepthSplit(images, lambda index: torch.from_numpy(draw(index)), fingerprint)


class NyuPair(NamedTuple):
    """An image and its depth map."""

    key: str  # the image's path as the list has it
    image: Path
    depth: Path


def list_nyu(root: Path, split: str) -> list[NyuPair]:
    """List the images of `nyu_train.txt` or `nyu_test.txt`, with their depth maps; each file is there.

    Raises:
        DataError: no such list, an empty one, or a line that does not name an image and its depth.
        MissingDataError: the list or a file is absent.
    """
    path = root / f"nyu_{split}.txt"
    if not path.is_file():
        raise MissingDataError(
            f"{path}: no such file; wanted a folder with nyu_train.txt and nyu_test.txt, whose lines name "
            f"an image, its depth map and the focal length"
        )
    lines = [(number, line.split()) for number, line in enumerate(lines_of(read_text(path)), start=1)]
    named = [(number, words) for number, words in lines if words]
    for number, words in named:
        if not 2 <= len(words) <= 3 or any(".." in Path(word).parts for word in words[:2]):
            raise DataError(
                f"{path}: line {number} is {shown(' '.join(words))[:80]!r}; wanted an image, its depth and "
                f"the focal length, as in bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579"
            )
    if not named:
        raise DataError(f"{path}: lists no images")
    relative = [(words[0].lstrip("/"), words[1].lstrip("/")) for _, words in named]
    places = [root / place for place in _PLACES[split]]
    base = next((place for place in places if (place / relative[0][0]).is_file()), root)
    pairs = [NyuPair(as_text(image), base / image, base / depth) for image, depth in relative]
    absent = [file for pair in pairs for file in (pair.image, pair.depth) if not file.is_file()]
    if absent:
        raise MissingDataError(
            f"{absent[0]}: no such file, and {path.name} names it ({len(absent):,} of {2 * len(pairs):,} "
            f"files are absent); unpack the whole of it"
        )
    twice = [key for key, count in Counter(pair.key for pair in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{path}: lists {shown(twice[0])} twice; list each image once")
    return pairs


def nyu_split(
    root: Path, split: str, *, limit: int | None, memo: Path, watch: ProgressFactory = no_progress
) -> DepthSplit:
    """Open a split of NYU Depth V2.

    Args:
        root: the folder with the lists.
        split: train or test.
        limit: maximum number of images, spread evenly.
        memo: a folder that caches content hashes of unchanged files.
        watch: shows the progress of the hashing.

    Raises:
        DataError: as `list_nyu`.
    """
    pairs = spread(list_nyu(root, split), limit)

    def store(files: list[Path], kind: str) -> StoredImages:
        entries = tuple(
            Entry(pair.key, "", file, 0, file.stat().st_size) for pair, file in zip(pairs, files, strict=True)
        )
        name = f"{as_text(root.resolve().name)}/{split}{kind}"
        return StoredImages(Listing(name, str(root.resolve() / split), ("",), entries), memo, watch)

    images = store([pair.image for pair in pairs], "")
    depths = store([pair.depth for pair in pairs], " depth")
    read = lambda index: read_nyu_depth(pairs[index].depth, depths.load(index))  # noqa: E731
    return DepthSplit(images, read, lambda: depths.fingerprint)


def read_nyu_depth(path: Path, data: bytes) -> Tensor:
    """Decode a depth map, a 16-bit PNG in millimetres: [480, 640] in metres, 0 = unknown.

    Raises:
        DataError: no such PNG, or one of another size.
    """
    try:
        with open_image(data, ("PNG",)) as file:
            mode, values = file.mode, np.asarray(file)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error
    if mode not in _DEPTH_MODES:
        raise DataError(
            f"{shown(path)}: a PNG of mode {mode}; wanted 16 bits of grey, the depth in millimetres"
        )
    if values.shape != NYU_SIZE:
        raise DataError(
            f"{shown(path)}: {_size_text(values.shape)}; NYU's depth maps are {_size_text(NYU_SIZE)}"
        )
    return torch.from_numpy(values.astype(np.float32) / _MILLIMETRES)


def read_nyu_image(split: DepthSplit, index: int) -> Tensor:
    """Read an image of NYU, uint8 [3, 480, 640].

    Raises:
        DataError: it cannot be decoded, or has another size.
    """
    key = f"{split.images.name}: {shown(split.images.keys[index])}"
    try:
        image = split.images.read(index)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    if image.shape[1:] != NYU_SIZE:
        raise DataError(f"{key}: {_size_text(image.shape[1:])}; NYU's images are {_size_text(NYU_SIZE)}")
    return image


def _size_text(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size)) + (" (height x width)" if len(size) == 2 else "")


def index_at(position: int, count: int, seed: int) -> int:
    """Return the image at a position of the endless training stream: each once in every `count` positions."""
    epoch, within = divmod(position, count)
    return int(np.random.default_rng([seed, 0, epoch]).permutation(count)[within])


@final
class NyuCrops(Dataset[tuple[Tensor, Tensor]]):
    """The endless training stream: its item at a position depends on the seed and the position only.

    An item is an image, float [3, h, w] in [0, 1], and the depth of its crop, [416, 544] in metres.

    Args:
        size: (h, w) of the encoder's input; a crop of another size is resized.
    """

    def __init__(self, split: DepthSplit, seed: int, size: Size) -> None:
        self._split, self._seed, self._size = split, seed, size

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        index = index_at(position, len(self._split), self._seed)
        image, depth = read_nyu_image(self._split, index), self._split.read_depth(index)
        pixels, depth = augment(image, depth, np.random.default_rng([self._seed, 1, position]))
        return resize_images(pixels.unsqueeze(0), self._size).squeeze(0), depth


@final
class NyuImages(Dataset[tuple[Tensor, Tensor]]):
    """Test images, float [3, h, w] in [0, 1], resized to an input size; and the depth that is scored.

    That is [480, 640], 0 outside `EIGEN_CROP`.
    """

    def __init__(self, split: DepthSplit, size: Size) -> None:
        self._split, self._size = split, size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = read_nyu_image(self._split, index).unsqueeze(0).float() / 255
        depth = self._split.read_depth(index)
        scored = torch.zeros_like(depth)
        scored[EIGEN_CROP] = depth[EIGEN_CROP]
        return resize_images(pixels, self._size).squeeze(0), scored


def augment(image: Tensor, depth: Tensor, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Take a random training crop: rotated, mirrored and with other colours, each half of the time.

    The augmentation of BTS and AdaBins, as the later linear probes have it: up to 2.5 degrees; gamma 0.9 to
    1.1, brightness 0.75 to 1.25, each channel 0.9 to 1.1.

    Args:
        image: uint8 [3, 480, 640].
        depth: [480, 640] in metres.
        draws: where the random numbers come from; their number is the same for every image.

    Returns:
        Float [3, 416, 544] in [0, 1], and [416, 544]; depth is 0 where a rotation shows nothing.
    """
    rows, columns = _NYU_CROP
    pixels, depth = image[:, rows, columns].float() / 255, depth[None, rows, columns]
    turns, mirrors, recolours = (draws.random(3) < 0.5).tolist()
    angle = float(draws.uniform(-2.5, 2.5))
    room = [have - want + 1 for have, want in zip(depth.shape[1:], TRAIN_CROP, strict=True)]
    top, left = (int(draws.integers(count)) for count in room)
    gamma, brightness = draws.uniform(0.9, 1.1), draws.uniform(0.75, 1.25)
    channels = torch.from_numpy(draws.uniform(0.9, 1.1, 3)).float()
    if turns:
        pixels = TF.rotate(pixels, angle, InterpolationMode.BILINEAR)
        depth = TF.rotate(depth, angle, InterpolationMode.NEAREST)
    if mirrors:
        pixels, depth = pixels.flip(-1), depth.flip(-1)
    window = (..., slice(top, top + TRAIN_CROP[0]), slice(left, left + TRAIN_CROP[1]))
    pixels, depth = pixels[window], depth[window]
    if recolours:
        pixels = (pixels**gamma * brightness * channels[:, None, None]).clamp(0, 1)
    return pixels, depth[0]
