"""The sources of a run and a lane's reader of each: shards are read in order, images by number."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, final

from torch import Tensor

from radio.errors import ConfigError, DataError, shown
from radio.images import MAX_IMAGE_BYTES, decode

from ..config import DataConfig
from ..images import NO_DATA, ConcatImages, Images, folder_part, scenes_part
from ..sampling import image_at, seed_of
from .faults import ReadError, ReadStats, ShardError
from .lanes import LaneAssignment, Sample, ShardStream, SourceReader
from .shards import LeftOut, expand, note_on, open_shard, outline, short_name
from .tar import Member, TarStream

_BARREN = 100  # shards in a row without an image, for one lane
_FEW, _LONG = 3, 600.0  # or fewer, after so many seconds: the network is down
_TRIES = 20  # unreadable images in a row, where they are read by number


class Source(Protocol):
    """One part of the data, read by lanes."""

    @property
    def fingerprint(self) -> str:
        """A hash of its content."""

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Its entries in a checkpoint's metadata."""

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> SourceReader:
        """Open a lane's reader of the source at a position."""


@final
class Shards:
    """WebDataset shards; every file with an image's extension is a sample.

    The shards are shuffled in every epoch and dealt to the lanes round-robin. If there are fewer shards than
    lanes, each is split into as many parts as needed, of every n-th image.
    """

    def __init__(self, pattern: str, names: Sequence[str]) -> None:
        self.pattern, self.names = pattern, names

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names without their folders, so that the data can move."""
        text = "\n".join(map(short_name, self.names))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Their entries in a checkpoint's metadata."""
        known = {"path": self.pattern, "fingerprint": self.fingerprint, "shards": len(self.names)}
        return [{**known, "labels_used": False}]

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> SourceReader:
        """Open a lane's reader of them at a position."""
        return ShardTrack(self.names, lane, lanes, place, seed)


@final
class Numbered:
    """Images that are read by number: folders and the generated world."""

    def __init__(self, images: Images) -> None:
        self.images = images

    @property
    def fingerprint(self) -> str:
        """A hash of their content."""
        return self.images.fingerprint

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Their entries in a checkpoint's metadata."""
        return self.images.sources

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> SourceReader:
        """Open a lane's reader of them at a position."""
        return NumberTrack(self.images, lane, lanes, place, seed)


@final
class ShardTrack:
    """One lane's reader of shards; its position is a shard's part, a byte and a number of images."""

    def __init__(self, names: Sequence[str], lane: int, lanes: int, place: Sequence[int], seed: int) -> None:
        self._names, self._lane, self._lanes, self._seed = names, lane, lanes, seed
        self._parts = -(-lanes // len(names))
        self._distinct = len(set(names))
        self._unit, self._offset, self._seen = (int(number) for number in place)
        self._tar: TarStream | None = None
        self._left_out = LeftOut()
        self._why = ""  # why the last part gave no further image

    @property
    def place(self) -> tuple[int, int, int]:
        """Finished parts of shards, the byte of the next header, and the images before it."""
        return self._unit, self._offset, self._seen

    def close(self) -> None:
        """Close the shard."""
        if self._tar is not None:
            self._tar.close()
        self._tar = None

    def take(self, tally: ReadStats) -> Sample:
        """Read the next readable image.

        Raises:
            DataError: too many shards in a row had none, or they took too long.
        """
        begun = time.monotonic()
        failed: set[str] = set()
        for tried in range(1, _BARREN + 1):
            unit = image_at(self._lane + self._unit * self._lanes, len(self._names) * self._parts, self._seed)
            shard, part = divmod(unit, self._parts)
            name = self._names[shard]
            sample = self._from_shard(name, part, tally, failed)
            if sample is not None:
                return sample
            late = tried >= _FEW and time.monotonic() - begun > _LONG
            if late or len(failed) == self._distinct:
                break
        raise DataError(
            f"no image in {tried} shards in a row, the last {shown(name)} ({self._why}); check the data"
        )

    def _from_shard(self, name: str, part: int, tally: ReadStats, failed: set[str]) -> Sample | None:
        """Read the next image of a shard's part; None, with the next part due, where it ends or is damaged.

        The shard's name is added to `failed` if it had no image at all.
        """
        try:
            tar = self._tar or self._open(name, part, tally)
            while (member := self._member(tar, name, part)) is not None:
                if self._left_out.see(member.name):
                    sample = self._from_member(tar, member, name, part, tally)
                    if sample is not None:
                        return sample
            note = outline(name).note if self._jumps(tar) else note_on(self._left_out, tar)
            if not self._seen:
                raise ShardError("empty", f"holds no images{note and f': {note}'}")
            if note and part == 0:
                tally.faults.append(ReadError("left out", name, note))
        except (ShardError, OSError) as error:
            cause = error.cause if isinstance(error, ShardError) else "unreadable"
            self._why = str(error)
            if not self._seen:
                failed.add(name)
            if part == 0:  # each part's lane meets the damage; only one reports it
                tally.faults.append(ReadError(cause, name, str(error)))
        self.close()
        self._unit, self._offset, self._seen = self._unit + 1, 0, 0
        return None

    def _open(self, name: str, part: int, tally: ReadStats) -> TarStream:
        """Open a shard at its start, or continue within it."""
        begins = self._offset == 0
        tally.shards += begins and part == 0
        self._tar = open_shard(name, self._offset)
        self._left_out, self._why = LeftOut(whole=begins), "a lane's part of it holds none"
        if begins and part == 0 and self._jumps(self._tar) and (note := outline(name).note):
            tally.faults.append(ReadError("left out", name, note))  # known beforehand
        return self._tar

    def _jumps(self, tar: TarStream) -> bool:
        return self._parts > 1 and tar.seeks

    def _member(self, tar: TarStream, name: str, part: int) -> Member | None:
        """Read the next file of the shard, or seek to this part's next image where that is possible."""
        if not self._jumps(tar):
            return tar.next()
        images, end, _ = outline(name)
        self._seen = min(self._seen + (part - self._seen) % self._parts, len(images))
        ends = self._seen == len(images)
        tar.jump(end if ends else images[self._seen])
        member = tar.next()
        if ends and member is not None:
            raise ShardError("unreadable", "has been changed while it was read")
        return member

    def _from_member(
        self, tar: TarStream, member: Member, shard: str, part: int, tally: ReadStats
    ) -> Sample | None:
        """Decode an image of the shard; None where it is another lane's or cannot be decoded."""
        mine = self._seen % self._parts == part
        small = member.size <= MAX_IMAGE_BYTES
        data = tar.read(member) if mine and small else b""
        self._seen, self._offset = self._seen + 1, member.end
        if not mine:
            return None
        try:
            if not small:
                raise DataError(f"has {member.size} bytes, and the limit is {MAX_IMAGE_BYTES}")
            return Sample(decode(data), f"{short_name(shard)}/{member.name}")
        except DataError as error:
            tally.faults.append(ReadError("image", f"{shard}/{member.name}", str(error)))
            self._why = f"its images cannot be decoded: {error}"
            return None


@final
class NumberTrack:
    """One lane's reader of images by number: shuffled in every epoch, dealt to the lanes round-robin."""

    def __init__(self, images: Images, lane: int, lanes: int, place: Sequence[int], seed: int) -> None:
        self._images, self._lane, self._lanes, self._seed = images, lane, lanes, seed
        self._done = int(place[0])

    @property
    def place(self) -> tuple[int, int, int]:
        """Images tried, and two zeros."""
        return self._done, 0, 0

    def close(self) -> None:
        """Do nothing: no file is open."""

    def take(self, tally: ReadStats) -> Sample:
        """Read the next readable image.

        Raises:
            DataError: too many in a row are unreadable.
        """
        for _ in range(_TRIES):
            number = image_at(self._lane + self._done * self._lanes, len(self._images), self._seed)
            self._done += 1
            try:
                return Sample(self._images.read(number), str(number))
            except DataError as error:
                tally.faults.append(ReadError("image", self._images.where(number), str(error)))
                last = error
        raise DataError(f"{_TRIES} images in a row cannot be read, the last: {last}; check the data")


@final
class Sources:
    """The sources that a run's settings name, and the share of a batch of each."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights

    def __len__(self) -> int:
        return len(self._sources)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints, in order."""
        text = " ".join(source.fingerprint for source in self._sources)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Their entries in a checkpoint's metadata."""
        return [part for source in self._sources for part in source.parts]

    @property
    def count(self) -> int | None:
        """Number of images; None with shards, which are not counted beforehand."""
        if not all("count" in part for part in self.sources):
            return None
        return sum(int(part["count"]) for part in self.sources)

    def lane(self, assignment: LaneAssignment, lane: int, cursor: Tensor, seed: int) -> ShardStream:
        """Open a lane of a group at a cursor [S, 4], in a run with this seed."""
        own = assignment.seed(seed)
        tracks = [
            source.track(lane, assignment.lanes, place[:-1], seed_of(own, "source", number))
            for number, (source, place) in enumerate(zip(self._sources, cursor.tolist(), strict=True))
        ]
        return ShardStream(tracks, self._weights, cursor[:, -1].tolist(), seed_of(own, "lane", lane))


def open_sources(config: DataConfig) -> Sources:
    """Open a run's sources: one per pattern, folder and scenes with weights, else one for all.

    Raises:
        ConfigError: there are no data, the weights are not one positive number per source, or there are
            none although shards are mixed with other sources.
        DataError: a folder is missing or empty.
    """
    parts = [*map(folder_part, config.images), *([scenes_part(config)] if config.scenes else [])]
    named = [Shards(pattern, expand([pattern])) for pattern in config.shards]
    if not parts and not named:
        raise ConfigError(NO_DATA)
    if config.weights:
        return _weighted(named, [ConcatImages([part]) for part in parts], config.weights)
    if parts and named:
        raise ConfigError(
            "how many images shards hold is not known beforehand; beside folders or scenes give "
            "--data.weights, a number for each source: the shards' patterns, the folders, then scenes"
        )
    if named:
        return Sources([Shards(" ".join(config.shards), expand(config.shards))], [1.0])
    return Sources([Numbered(ConcatImages(parts))], [1.0])


def _weighted(shards: list[Shards], folders: list[ConcatImages], weights: Sequence[float]) -> Sources:
    sources: list[Source] = [*shards, *map(Numbered, folders)]
    if len(weights) != len(sources) or not min(weights) > 0 or not math.isfinite(sum(weights)):
        raise ConfigError(
            f"--data.weights {' '.join(map(str, weights))}: wanted a number above zero for each of the "
            f"{len(sources)} sources: the shards' patterns, the folders, then scenes"
        )
    return Sources(sources, weights)
