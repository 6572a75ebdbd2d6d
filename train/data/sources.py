"""The sources of a run and one lane's track through each: shards read in order, pictures by number."""

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
from ..pictures import NO_DATA, Joined, Pictures, folder_part, scenes_part
from ..sampling import picture_at, seed_of
from .faults import Fault, ShardError, Tally
from .lanes import Deal, Lane, Sample, Track
from .shards import LeftOut, expand, note_on, open_shard, outline, short_name
from .tar import Member, TarStream

_BARREN = 100  # shards of a lane in a row without a picture
_FEW, _LONG = 3, 600.0  # or fewer, when they take so many seconds: a network that is gone
_TRIES = 20  # pictures in a row that cannot be read, where they are read by number


class Source(Protocol):
    """One part of the data that lanes go through."""

    @property
    def fingerprint(self) -> str:
        """A hash of what it holds."""

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What a checkpoint's card says of it."""

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> Track:
        """A lane's way through it, from a place on."""


@final
class Shards:
    """WebDataset shards; every file with a picture's ending is a sample.

    The shards of every epoch are shuffled and dealt to the lanes in turn, epoch after epoch. Where there are
    fewer shards than lanes, each is dealt in as many parts as are needed, of every n-th picture.
    """

    def __init__(self, pattern: str, names: Sequence[str]) -> None:
        self.pattern, self.names = pattern, names

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names, not of where they are kept, so that a run can move with its data."""
        text = "\n".join(map(short_name, self.names))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What a checkpoint's card says of them."""
        known = {"path": self.pattern, "fingerprint": self.fingerprint, "shards": len(self.names)}
        return [{**known, "labels_used": False}]

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> Track:
        """A lane's way through them, from a place on."""
        return ShardTrack(self.names, lane, lanes, place, seed)


@final
class Numbered:
    """Pictures that are read by number: folders and the generated world."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    @property
    def fingerprint(self) -> str:
        """A hash of their content."""
        return self.pictures.fingerprint

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What a checkpoint's card says of them."""
        return self.pictures.sources

    def track(self, lane: int, lanes: int, place: Sequence[int], seed: int) -> Track:
        """A lane's way through them, from a place on."""
        return NumberTrack(self.pictures, lane, lanes, place, seed)


@final
class ShardTrack:
    """One lane's way through shards: at a byte of one of them, after so many of its pictures."""

    def __init__(self, names: Sequence[str], lane: int, lanes: int, place: Sequence[int], seed: int) -> None:
        self._names, self._lane, self._lanes, self._seed = names, lane, lanes, seed
        self._parts = -(-lanes // len(names))
        self._distinct = len(set(names))
        self._unit, self._offset, self._seen = (int(number) for number in place)
        self._tar: TarStream | None = None
        self._left_out = LeftOut()
        self._why = ""  # the last part ended before a picture

    @property
    def place(self) -> tuple[int, int, int]:
        """Parts of shards done, the byte of the next header, and the pictures before it."""
        return self._unit, self._offset, self._seen

    def close(self) -> None:
        """Let go of the shard."""
        if self._tar is not None:
            self._tar.close()
        self._tar = None

    def take(self, tally: Tally) -> Sample:
        """The next picture that can be read.

        Raises:
            DataError: too many shards in a row gave none, or they took too long.
        """
        begun = time.monotonic()
        failed: set[str] = set()
        for tried in range(1, _BARREN + 1):
            unit = picture_at(
                self._lane + self._unit * self._lanes, len(self._names) * self._parts, self._seed
            )
            shard, part = divmod(unit, self._parts)
            name = self._names[shard]
            sample = self._from_shard(name, part, tally, failed)
            if sample is not None:
                return sample
            late = tried >= _FEW and time.monotonic() - begun > _LONG
            if late or len(failed) == self._distinct:
                break
        raise DataError(
            f"no picture in {tried} shards in a row, the last {shown(name)} ({self._why}); check the data"
        )

    def _from_shard(self, name: str, part: int, tally: Tally, failed: set[str]) -> Sample | None:
        """The next picture of a shard's part; None where it ends or is damaged, and the next one is due.

        Its name goes into `failed` where it gave no picture at all.
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
                raise ShardError("empty", f"holds no pictures{note and f': {note}'}")
            if note and part == 0:
                tally.faults.append(Fault("left out", name, note))
        except (ShardError, OSError) as error:
            cause = error.cause if isinstance(error, ShardError) else "unreadable"
            self._why = str(error)
            if not self._seen:
                failed.add(name)
            if part == 0:  # every lane that has a part of it meets the damage; one answers for it
                tally.faults.append(Fault(cause, name, str(error)))
        self.close()
        self._unit, self._offset, self._seen = self._unit + 1, 0, 0
        return None

    def _open(self, name: str, part: int, tally: Tally) -> TarStream:
        """Begin with a shard, or go on within it."""
        begins = self._offset == 0
        tally.shards += begins and part == 0
        self._tar = open_shard(name, self._offset)
        self._left_out, self._why = LeftOut(whole=begins), "a lane's part of it holds none"
        if begins and part == 0 and self._jumps(self._tar) and (note := outline(name).note):
            tally.faults.append(Fault("left out", name, note))  # known beforehand
        return self._tar

    def _jumps(self, tar: TarStream) -> bool:
        return self._parts > 1 and tar.seeks

    def _member(self, tar: TarStream, name: str, part: int) -> Member | None:
        """The next file of the shard, or at once the next picture of this part where that can be sought."""
        if not self._jumps(tar):
            return tar.next()
        pictures, end, _ = outline(name)
        self._seen = min(self._seen + (part - self._seen) % self._parts, len(pictures))
        ends = self._seen == len(pictures)
        tar.jump(end if ends else pictures[self._seen])
        member = tar.next()
        if ends and member is not None:
            raise ShardError("unreadable", "has been changed while it was read")
        return member

    def _from_member(
        self, tar: TarStream, member: Member, shard: str, part: int, tally: Tally
    ) -> Sample | None:
        """A picture of the shard; None where it is another lane's or cannot be decoded."""
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
            tally.faults.append(Fault("picture", f"{shard}/{member.name}", str(error)))
            self._why = f"its pictures cannot be decoded: {error}"
            return None


@final
class NumberTrack:
    """One lane's way through pictures by number: every epoch shuffled, and dealt to the lanes in turn."""

    def __init__(self, pictures: Pictures, lane: int, lanes: int, place: Sequence[int], seed: int) -> None:
        self._pictures, self._lane, self._lanes, self._seed = pictures, lane, lanes, seed
        self._done = int(place[0])

    @property
    def place(self) -> tuple[int, int, int]:
        """Pictures tried."""
        return self._done, 0, 0

    def close(self) -> None:
        """Nothing is open."""

    def take(self, tally: Tally) -> Sample:
        """The next picture that can be read.

        Raises:
            DataError: too many in a row cannot.
        """
        for _ in range(_TRIES):
            number = picture_at(self._lane + self._done * self._lanes, len(self._pictures), self._seed)
            self._done += 1
            try:
                return Sample(self._pictures.read(number), str(number))
            except DataError as error:
                tally.faults.append(Fault("picture", self._pictures.where(number), str(error)))
                last = error
        raise DataError(f"{_TRIES} pictures in a row cannot be read, the last: {last}; check the data")


@final
class Sources:
    """What a run's settings name, and how much of a batch each takes."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights

    def __len__(self) -> int:
        return len(self._sources)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources', in order."""
        text = " ".join(source.fingerprint for source in self._sources)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What a checkpoint's card says of them."""
        return [part for source in self._sources for part in source.parts]

    @property
    def count(self) -> int | None:
        """Pictures in all; None with shards, which are not counted beforehand."""
        if not all("count" in part for part in self.sources):
            return None
        return sum(int(part["count"]) for part in self.sources)

    def lane(self, deal: Deal, lane: int, cursor: Tensor, seed: int) -> Lane:
        """A lane of a group from a cursor [S, 4] on, in a run with this seed."""
        own = deal.seed(seed)
        tracks = [
            source.track(lane, deal.lanes, place[:-1], seed_of(own, "source", number))
            for number, (source, place) in enumerate(zip(self._sources, cursor.tolist(), strict=True))
        ]
        return Lane(tracks, self._weights, cursor[:, -1].tolist(), seed_of(own, "lane", lane))


def open_sources(config: DataConfig) -> Sources:
    """The sources of a run: each pattern, folder and the generated world, or all of a kind together.

    Raises:
        ConfigError: no data, weights that are not one above zero for each source, or none where sources of
            both kinds are mixed.
        DataError: a folder that is absent or empty.
    """
    parts = [*map(folder_part, config.images), *([scenes_part(config)] if config.scenes else [])]
    named = [Shards(pattern, expand([pattern])) for pattern in config.shards]
    if not parts and not named:
        raise ConfigError(NO_DATA)
    if config.weights:
        return _weighted(named, [Joined([part]) for part in parts], config.weights)
    if parts and named:
        raise ConfigError(
            "how many pictures shards hold is not known beforehand; beside folders or scenes give "
            "--data.weights, a number for each source: the shards' patterns, the folders, then scenes"
        )
    if named:
        return Sources([Shards(" ".join(config.shards), expand(config.shards))], [1.0])
    return Sources([Numbered(Joined(parts))], [1.0])


def _weighted(shards: list[Shards], folders: list[Joined], weights: Sequence[float]) -> Sources:
    sources: list[Source] = [*shards, *map(Numbered, folders)]
    if len(weights) != len(sources) or not min(weights) > 0 or not math.isfinite(sum(weights)):
        raise ConfigError(
            f"--data.weights {' '.join(map(str, weights))}: wanted a number above zero for each of the "
            f"{len(sources)} sources: the shards' patterns, the folders, then scenes"
        )
    return Sources(sources, weights)
