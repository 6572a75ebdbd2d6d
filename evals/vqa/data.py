"""Training data of LLaVA: conversations as tokens and labels, their batches, and images by name.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`; `<image>` in
the first question marks the image's position. Text-only records have neither. A file is one
JSON list or has one record per line. As in LLaVA's own loader, an answer before the first question is
dropped; unusable records are dropped too, counted, and accepted up to a share of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NotRequired, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from typing_extensions import TypedDict

from radio.data import ImageSource
from radio.errors import DataError, MissingDataError, shown
from radio.image_files import Entry, Listing, StoredImages, spread
from radio.io import validate
from radio.progress import ProgressFactory, no_progress

from .records import read_list
from .scoring import IMAGE
from .settings import Template

# Letters: B batch, S tokens of a sample, T tokens of an image, D token width, N images, H W pixels, h w input
# size.

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORED = -100
"""The label of tokens without a loss."""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Record(NamedTuple):
    """A conversation, with or without an image; `<image>` is removed from the questions."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


class Piece(NamedTuple):
    """A part of the text that the language model sees, and whether the loss covers it."""

    text: str
    learned: bool


class Reading(NamedTuple):
    """The usable records of a file of conversations, and what was left out."""

    records: list[Record]
    unusable: str  # how many records cannot be used, and the first; empty without any
    early: str  # how many begin with an answer, and the first; likewise
    num_unusable: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for reports on what was left out."""
        return tuple(note for note in (self.unusable, self.early) if note)


_Turn = TypedDict("_Turn", {"from": str, "value": str})


class _Row(TypedDict):
    """A record as in the file."""

    id: NotRequired[int | str | None]
    image: NotRequired[str | None]
    conversations: list[_Turn]


_ROW = TypeAdapter(_Row)


def read_records(
    path: Path, is_image: Callable[[str], bool], limit: int | None = None, max_error_fraction: float = 0.01
) -> Reading:
    """Read and check the conversations in a file.

    Args:
        path: one JSON list of records, or one record per line.
        is_image: whether an image of that name exists.
        limit: use this many records, evenly spread.
        max_error_fraction: drop unusable records, up to this share of them.

    Raises:
        DataError: no such file, not such a list, or too many unusable records; names the first and
            the number of the others.
    """
    rows = spread(read_list(path), limit)
    if not rows:
        raise DataError(f"{shown(path)}: wanted a list of LLaVA records with one or more, got an empty list")
    records: list[Record] = []
    unusable: list[str] = []
    early: list[str] = []
    for number, (where, row) in enumerate(rows):
        id = row.get("id") if isinstance(row, dict) else None
        label = f"{where} (id {shown(str(id)[:80]) if isinstance(id, str | int | None) else _type(id)})"
        try:
            record, begins_early = _record(row, str(number), is_image)
        except DataError as error:
            unusable.append(f"{label}: {error}")
            continue
        records.append(record)
        if begins_early:
            early.append(label)
    if len(unusable) > max_error_fraction * len(rows):
        more = f"; {len(unusable) - 1} more records cannot be used" if len(unusable) > 1 else ""
        hint = f" (up to --max-error-fraction {max_error_fraction:g} of the records may be left out)"
        raise DataError(f"{shown(path)}: {unusable[0]}{hint}{more}")
    bad_note = early_note = ""
    if unusable:
        bad_note = (
            f"{len(unusable)} of the {len(rows)} records of {path.name} cannot be used and were left out; "
            f"the first is {unusable[0]}"
        )
    if early:
        early_note = (
            f"{len(early)} of the {len(rows)} conversations of {path.name} begin with an answer, which was "
            f"left out as LLaVA does; the first is {early[0]}"
        )
    return Reading(records, bad_note, early_note, len(unusable))


def _record(row: Any, number: str, is_image: Callable[[str], bool]) -> tuple[Record, bool]:
    """Check a record; return it, and whether it begins with an answer, which is dropped."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError(f"wanted an object with a list 'conversations', got {_type(row)}")
    data = validate(_ROW, row, "a record is {'id', 'image', 'conversations': [{'from', 'value'}]}")
    turns = data["conversations"]
    begins_early = len(turns) > 1 and turns[0]["from"] == "gpt"
    turns = turns[begins_early:]
    _check_roles([turn["from"] for turn in turns])
    values = [turn["value"] for turn in turns]
    empty = next((index for index in range(1, len(values), 2) if not values[index].strip()), None)
    if empty is not None:
        raise DataError(f"the answer in turn {empty} is empty")
    image, id = data.get("image"), data.get("id")
    marks = [value.count(IMAGE) for value in values]
    num_images = 0 if image is None else 1
    if sum(marks) != num_images:
        raise DataError(f"holds {sum(marks)} marks {IMAGE} for {num_images} images; wanted {num_images}")
    if image is not None and not marks[0]:
        raise DataError(f"the mark {IMAGE} is in turn {marks.index(1)}; wanted it in the first")
    if image is not None and not is_image(image):
        raise DataError(f"there is no image {image[:200]!r}")
    pairs = tuple(
        Turn(question.replace(IMAGE, "").strip(), answer.strip())
        for question, answer in zip(values[::2], values[1::2], strict=True)
    )
    return Record(number if id is None else str(id), image, pairs), begins_early


def _check_roles(roles: list[str]) -> None:
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        raise DataError(f"a turn is from {unknown[0][:40]!r}; wanted 'human' or 'gpt'")
    if not roles or roles == ["human"]:
        raise DataError("a conversation without an answer; wanted a 'gpt' turn after each 'human' turn")
    for index, role in enumerate(roles):
        if role != ("human", "gpt")[index % 2]:
            raise DataError(
                f"roles out of order: turn {index} is from {role!r}; 'human' and 'gpt' take turns"
            )
    if len(roles) % 2:
        raise DataError("a conversation without an answer to its last question; remove that question")


def _type(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], {}) else f"a {type(value).__name__}"


def fingerprint(records: Iterable[Record]) -> str:
    """Compute a hash of the training records, with images by name."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, ensure_ascii=False).encode())
    return digest.hexdigest()


def format_prompt(question: str, *, has_image: bool) -> str:
    """Format a question by the template `v1`, up to the model's answer; `<image>` marks the image's position.

    Raises:
        DataError: a question that contains `<image>` itself.
    """
    if IMAGE in question:
        raise DataError(f"a question holds the mark {IMAGE} itself: {question[:80]!r}; take it out")
    mark = f"{IMAGE}\n" if has_image else ""
    return f"{SYSTEM} USER: {mark}{question} ASSISTANT:"


def pieces(record: Record, template: Template, end: str) -> list[Piece]:
    """Split a record's text into learned and other pieces; `end` is the language model's end of text."""
    if template == "plain":
        mark = "" if record.image is None else IMAGE
        return [Piece(mark, False), Piece(f"{record.turns[0].answer}\n", True)]
    parts: list[Piece] = []
    for number, turn in enumerate(record.turns):
        prompt = format_prompt(turn.question, has_image=record.image is not None and number == 0)
        if number:  # the system text comes once
            prompt = prompt.removeprefix(f"{SYSTEM} ")
        # the space belongs to the answer: many tokenizers merge it with the following word
        parts += [Piece(prompt, False), Piece(f" {turn.answer}{end}", True)]
    return parts


class VisionInputs(Protocol):
    """The model's input for each image, by name."""

    num_tokens: int
    """Number of tokens T of an image."""

    def __getitem__(self, name: str) -> Tensor:
        """Return tokens [T, D], or pixels [3, h, w] in [0, 1]."""


class TrainingSample(NamedTuple):
    """One conversation as input of the model."""

    ids: Tensor  # [S] int64
    labels: Tensor  # [S] int64, IGNORED for tokens without a loss
    image: Tensor | None


def tokenize(parts: Sequence[Piece], tokenizer: Any, num_tokens: int) -> tuple[list[int], list[int]]:
    """Tokenize a text as a whole into ids and labels; a token is learned if its text is.

    Every `<image>` becomes `num_tokens` placeholders. The tokenizer's begin token, if it has one, comes
    first.
    """
    text, spans = "", []
    for part in parts:
        if part.learned:
            spans.append((len(text), len(text) + len(part.text)))
        text += part.text
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    labels = [IGNORED] * len(ids)
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == image_token:
            ids += [token] * num_tokens
            labels += [IGNORED] * num_tokens
            continue
        is_learned = stop > start and any(first <= start and stop <= last for first, last in spans)
        ids.append(token)
        labels.append(token if is_learned else IGNORED)
    return ids, labels


def shuffle_images(records: Iterable[Record], names: Sequence[str], seed: int) -> list[Record]:
    """Give each record another one's image, of `names`: the control of whether training uses the images."""
    permuted = np.random.default_rng([seed, len(names)]).permutation(names).tolist()
    other: dict[str | None, str | None] = {None: None, **dict(zip(names, permuted, strict=True))}
    return [record._replace(image=other[record.image]) for record in records]


@final
class Conversations(Dataset[TrainingSample]):
    """Records as samples.

    Args:
        inputs: the images; None if no record has any.
        longest: maximum tokens of a sample; longer ones are truncated.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        tokenizer: Any,
        inputs: VisionInputs | None,
        longest: int,
    ) -> None:
        self.records = records
        self._template, self._tokenizer, self._inputs = template, tokenizer, inputs
        self._longest, self._num_tokens = longest, inputs.num_tokens if inputs is not None else 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TrainingSample:
        record = self.records[index]
        parts = pieces(record, self._template, self._tokenizer.eos_token)
        ids, labels = tokenize(parts, self._tokenizer, self._num_tokens)
        image = None
        if record.image is not None:
            assert self._inputs is not None
            image = self._inputs[record.image]
        return TrainingSample(
            torch.tensor(ids[: self._longest]), torch.tensor(labels[: self._longest]), image
        )

    def lengths(self) -> list[int]:
        """Estimate the length of each sample: its words, and the tokens of its image."""
        return [
            sum(len(text.split()) for turn in record.turns for text in turn)
            + (self._num_tokens if record.image is not None else 0)
            for record in self.records
        ]

    def modalities(self) -> list[bool]:
        """Return for each sample whether it has an image."""
        return [record.image is not None for record in self.records]


def collate(samples: Sequence[TrainingSample], pad_token: int) -> dict[str, Tensor]:
    """Pad samples on the right: `input_ids`, `attention_mask`, `labels` [B, S]; `pixel_values` of images."""
    batch = pad([sample.ids for sample in samples], pad_token, left=False)
    batch["labels"] = pad_sequence(
        [sample.labels for sample in samples], batch_first=True, padding_value=IGNORED
    )
    images = [sample.image for sample in samples if sample.image is not None]
    if images:
        batch["pixel_values"] = torch.stack(images).float()
    return batch


def pad(ids: Sequence[Tensor], pad_token: int, *, left: bool) -> dict[str, Tensor]:
    """Pad on the right for training, on the left for generation: `input_ids`, `attention_mask` [B, S]."""
    stack = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
    masks = [torch.ones_like(row) for row in ids]
    return {"input_ids": stack(list(ids), padding_value=pad_token), "attention_mask": stack(masks)}


def epoch_order(
    lengths: Sequence[int], modalities: Sequence[bool], batch: int, seed: int, epoch: int
) -> list[int]:
    """Order the indices of an epoch: batches of one modality, sorted by length within, incomplete ones last.

    Each modality is shuffled and cut into batches of B; the batches are shuffled. Sorting within a batch
    does not change the samples of a step, but its micro-batches need less padding.
    """
    generator = np.random.default_rng([seed, epoch])
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        indices = np.flatnonzero(np.array(modalities, dtype=bool) == modality)
        shuffled = generator.permutation(indices).tolist()
        whole = len(shuffled) // batch * batch
        batches += [shuffled[start : start + batch] for start in range(0, whole, batch)]
        rest += shuffled[whole:]
    chosen = [batches[index] for index in generator.permutation(len(batches))]
    parts = [*chosen, *(rest[start : start + batch] for start in range(0, len(rest), batch))]
    return [index for part in parts for index in sorted(part, key=lambda i: (-lengths[i], i))]


def sample_order(
    lengths: Sequence[int], modalities: Sequence[bool], batch: int, steps: int, seed: int
) -> list[int]:
    """Order the sample indices of `steps` batches, over as many epochs as they need.

    An epoch's last, incomplete batch is filled from the next epoch.
    """
    order: list[int] = []
    epoch = 0
    while len(order) < steps * batch:
        order += epoch_order(lengths, modalities, batch, seed, epoch)
        epoch += 1
    return order[: steps * batch]


PADDING = (0.48145466, 0.4578275, 0.40821073)
"""The mean colour of CLIP's training images, which LLaVA pads with."""


@final
class NamedImages:
    """The files of a folder or the members of one tar file, by name.

    Raises:
        MissingDataError: no such folder or file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._is_tar = path, path.is_file()
        self._listed: dict[str, frozenset[str]] = {}  # the files of each folder below `path`
        if not path.is_dir() and not self._is_tar:
            raise MissingDataError(f"{path}: no such folder or tar file of images")

    def __contains__(self, name: object) -> bool:
        """Check whether there is an image of that name; each folder is listed once, when it is asked for."""
        return isinstance(name, str) and any(self._is_listed(spelling) for spelling in _spellings(name))

    def source(
        self, names: Iterable[str], memo: Path | None = None, watch: ProgressFactory = no_progress
    ) -> ImageSource:
        """Return a source of the named images, each once, sorted by name.

        Args:
            names: the images.
            memo: a folder that caches content hashes of unchanged files.
            watch: shows the progress of the hashing.

        Raises:
            DataError: an image is absent.
        """
        entries = []
        for name in sorted(set(names)):
            place = self._find(name)
            if place is None:
                raise MissingDataError(f"{self.path}: there is no image {name!r}")
            entries.append(Entry(name, "", *place))
        listing = Listing(self.path.name, str(self.path.resolve()), ("",), tuple(entries))
        return StoredImages(listing, memo, watch)

    def _find(self, name: str) -> tuple[Path, int, int] | None:
        """Find an image; return file, offset and size of its bytes, or None without one of that name.

        Accents may be in another Unicode form (NFC, NFD) than in the folder or tar file.
        """
        for spelling in _spellings(name):
            if self._is_tar:
                if spelling in self._members:
                    return self._members[spelling]
            elif os.path.isfile(self.path / spelling):  # noqa: PTH113 (unlike Path's, it never raises)
                return self.path / spelling, 0, (self.path / spelling).stat().st_size
        return None

    def _is_listed(self, path: str) -> bool:
        if self._is_tar:
            return path in self._members
        folder, _, name = path.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = _list_files(self.path / folder)
        return name in self._listed[folder]

    @cached_property
    def _members(self) -> dict[str, tuple[Path, int, int]]:
        members: dict[str, tuple[Path, int, int]] = {}
        length = self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    name = str(PurePosixPath(member.name))
                    if not 0 <= member.size <= length - member.offset_data:
                        raise DataError(
                            f"{self.path}: {shown(name)} is said to have {member.size} bytes, and "
                            f"{length - member.offset_data} are left of the file; it is damaged or cut off"
                        )
                    if member.isfile():
                        if name in members:
                            raise DataError(f"{self.path}: holds {shown(name)} twice; keep one of them")
                        members[name] = (self.path, member.offset_data, member.size)
        except DataError:
            raise
        except (tarfile.TarError, OSError, EOFError, MemoryError, ValueError) as error:
            raise DataError(f"{self.path}: not a tar file without compression ({error})") from error
        return members


def _spellings(name: str) -> Iterator[str]:
    """Yield the Unicode forms in which a relative path may be stored; none of a path that leads out."""
    plain = PurePosixPath(name)
    if not plain.is_absolute() and ".." not in plain.parts:
        yield str(plain)
        yield from (unicodedata.normalize(form, str(plain)) for form in ("NFC", "NFD"))


def _list_files(folder: Path) -> frozenset[str]:
    """List the files of a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if _is_file(entry))
    except (OSError, ValueError):  # not there, or no name of a folder
        return frozenset()


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a circular link
        return False


@final
class PaddedImages:
    """A source whose images are centred and padded with the mean colour to the aspect ratio of `size`."""

    def __init__(self, source: ImageSource, size: tuple[int, int]) -> None:
        self._source, self._size = source, size
        self.name, self.location, self.notes = source.name, source.location, source.notes
        self.classes, self.keys = source.classes, source.keys

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the source."""
        return self._source.labels

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source and of the aspect ratio."""
        return f"{self._source.fingerprint} padded to {self._size[0]}:{self._size[1]}"

    def read(self, index: int) -> Tensor:
        """Read an image and pad it: uint8 [3, H, W]."""
        return pad_image(self._source.read(index), self._size)


def pad_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad an image uint8 [3, H, W] on both sides to the smallest one of the aspect ratio of `size`."""
    height, width = image.shape[-2:]
    tall = max(height, -(-width * size[0] // size[1]))
    wide = max(width, -(-height * size[1] // size[0]))
    if (tall, wide) == (height, width):
        return image
    colour = torch.tensor([int(255 * part) for part in PADDING], dtype=torch.uint8)
    padded = colour.view(3, 1, 1).expand(3, tall, wide).clone()
    top, left = (tall - height) // 2, (wide - width) // 2
    padded[:, top : top + height, left : left + width] = image
    return padded
