"""Training data: records, prompts, tokens and labels, the order of samples, images by name."""

from __future__ import annotations

import json
import os
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.vqa.benchmarks import choose, short, short_with_ocr
from evals.vqa.data import (
    IGNORED,
    PADDING,
    Conversations,
    NamedImages,
    PaddedImages,
    Piece,
    Record,
    TrainingSample,
    Turn,
    collate,
    epoch_order,
    fingerprint,
    format_prompt,
    pad,
    pad_image,
    pieces,
    read_records,
    sample_order,
    shuffle_images,
    tokenize,
)
from evals.vqa.language import LanguageModel
from radio.errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Row = Callable[..., dict[str, Any]]
Save = Callable[[Any], Path]


def there(name: str) -> bool:
    return name == "a.png"


def test_records_are_read_with_and_without_a_image(make_row: Row, write_json: Save) -> None:
    path = write_json(
        [
            make_row("1", "a.png", "<image>\nWhat?", "A cat.", "Where?", " Here. "),
            make_row("2", "a.png", "Which colour?\n<image>", "red"),
            make_row("3", None, "Hello?", "Hi."),
        ]
    )
    assert read_records(path, there).records == [
        Record("1", "a.png", (Turn("What?", "A cat."), Turn("Where?", "Here."))),
        Record("2", "a.png", (Turn("Which colour?", "red"),)),
        Record("3", None, (Turn("Hello?", "Hi."),)),
    ]
    assert [record.id for record in read_records(path, there, limit=2).records] == ["1", "2"]


@pytest.mark.parametrize(
    ("turns", "image", "message"),
    [
        (("<image>\nWhat?", "A cat."), "b.png", r"there is no image 'b.png'"),
        (("<image>\nWhat?",), "a.png", r"a conversation without an answer; wanted a 'gpt' turn"),
        ((), "a.png", r"a conversation without an answer"),
        (("<image>\nWhat?", "A", "And?"), "a.png", r"without an answer to its last question"),
        (("What?", "A cat."), "a.png", r"holds 0 marks <image> for 1 images; wanted 1"),
        (("<image><image>\nWhat?", "A"), "a.png", r"holds 2 marks <image> for 1 images"),
        (("<image>\nWhat?", "A"), None, r"holds 1 marks <image> for 0 images; wanted 0"),
        (("What?", "A", "<image>?", "B"), "a.png", r"the mark <image> is in turn 2; wanted it in the first"),
        (("<image>\nWhat?", " "), "a.png", r"the answer in turn 1 is empty"),
    ],
)
def test_what_cannot_be_used_is_named(
    make_row: Row, write_json: Save, turns: tuple[str, ...], image: str | None, message: str
) -> None:
    good = make_row("1", "a.png", "<image>\nWhat?", "A cat.")
    path = write_json([good, make_row("2", image, *turns), make_row("3", image, *turns)])
    with pytest.raises(DataError, match=message) as error:
        read_records(path, there)
    assert str(error.value).startswith(f"{path}: record 1 (id 2): ")
    assert str(error.value).endswith("; 1 more records cannot be used")


def test_roles_out_of_order(make_row: Row, write_json: Save) -> None:
    bad = make_row("7", None, "What?", "A")
    bad["conversations"] = [bad["conversations"][place] for place in (0, 1, 1)]
    with pytest.raises(DataError, match=r"record 0 \(id 7\): roles out of order: turn 2 is from 'gpt'"):
        read_records(write_json([bad]), there)
    bad["conversations"][0]["from"] = "system"
    with pytest.raises(DataError, match=r"a turn is from 'system'; wanted 'human' or 'gpt'"):
        read_records(write_json([bad]), there)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, r"line 1 \(id None\): wanted an object with a list 'conversations', got an empty dict"),
        ([], "got an empty list"),
        ([3], r"record 0 \(id None\): wanted an object with a list 'conversations', got a int"),
        (
            [{"conversations": [{"from": "human"}]}],
            r"'conversations': \[{'from', 'value'}\]}: conversations\[0\].value: field required",
        ),
        (
            [
                {
                    "image": 3,
                    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
                }
            ],
            "image: input should be a valid string, got 3",
        ),
    ],
)
def test_other_json_is_refused(write_json: Save, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(write_json(rows), there)


def test_one_record_a_line_and_what_others_write(make_row: Row, tmp_path: Path) -> None:
    rows = [
        make_row("1", "a.png", "<image>\nWhat?", "A cat."),
        make_row("2", None, "Où?", "Là\u2028bas \ud83d"),
    ]
    rows[0]["id"] = 1  # a number
    rows[1]["id"] = None
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    wanted = [
        Record("1", "a.png", (Turn("What?", "A cat."),)),
        Record("1", None, (Turn("Où?", "Là\u2028bas \ufffd"),)),  # half an emoji
    ]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "data.jsonl").write_text(lines, encoding=encoding)
        assert read_records(tmp_path / "data.jsonl", there).records == wanted
    fingerprint(wanted)


def test_an_answer_before_the_first_question_is_left_out(make_row: Row, write_json: Save) -> None:
    early = make_row("2", "a.png", "<image>\nWhat?", "A cat.")
    early["conversations"].insert(0, {"from": "gpt", "value": "I am ready."})
    good = make_row("1", None, "Hello?", "Hi.")
    path = write_json([good, early])
    reading = read_records(path, there)
    records, notes = reading.records, reading.notes
    assert records == [
        Record("1", None, (Turn("Hello?", "Hi."),)),
        Record("2", "a.png", (Turn("What?", "A cat."),)),
    ]
    (note,) = notes
    assert note == (
        "1 of the 2 conversations of data.json begin with an answer, which was left out as LLaVA does; "
        "the first is record 1 (id 2)"
    )


def test_a_few_records_that_cannot_be_used_are_left_out(make_row: Row, write_json: Save) -> None:
    rows = [make_row(f"{n}", None, "Hello?", "Hi.") for n in range(99)]
    path = write_json([*rows[:50], make_row("empty", None, "Hello?", " "), *rows[50:]])
    reading = read_records(path, there)
    records, notes = reading.records, reading.notes
    assert [record.id for record in records] == [f"{n}" for n in range(99)]
    (note,) = notes
    assert note == (
        "1 of the 100 records of data.json cannot be used and were left out; the first is record 50 "
        "(id empty): the answer in turn 1 is empty"
    )
    with pytest.raises(DataError, match=r"record 50 \(id empty\): the answer in turn 1 is empty"):
        read_records(path, there, max_error_fraction=0.009)


def test_conversations_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "absent.json", there)
    (tmp_path / "part.json").write_text('[{"id"')
    with pytest.raises(DataError, match="is not JSON"):
        read_records(tmp_path / "part.json", there)


def test_plain_learns_the_caption_and_v1_the_answers() -> None:
    caption = Record("1", "a.png", (Turn("", "a red cat"),))
    assert pieces(caption, "plain", "</s>") == [Piece("<image>", False), Piece("a red cat\n", True)]
    record = Record("1", "a.png", (Turn("What?", "Cat."), Turn("Where?", "Here.")))
    assert pieces(record, "v1", "</s>") == [
        Piece(f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", False),
        Piece(" Cat.</s>", True),
        Piece("USER: Where? ASSISTANT:", False),
        Piece(" Here.</s>", True),
    ]
    assert pieces(record._replace(image=None), "v1", "</s>")[0].text == f"{SYSTEM} USER: What? ASSISTANT:"


def test_the_fingerprint_is_of_all_that_is_said() -> None:
    record = Record("1", "a.png", (Turn("What?", "Cat."),))
    assert fingerprint([record]) == fingerprint([record])
    changed = [record._replace(image=None), record._replace(turns=(Turn("What?", "Dog."),))]
    assert len({fingerprint([one]) for one in [record, *changed]}) == 3


def spoken(tiny: LanguageModel, ids: list[int]) -> list[str]:
    return [tiny.tokenizer.convert_ids_to_tokens(number) for number in ids]


def test_two_turns_token_by_token(tiny: LanguageModel) -> None:
    record = Record("1", "red.png", (Turn("What colour is it?", "red"), Turn("And grass?", "green blue")))
    ids, labels = tokenize(pieces(record, "v1", tiny.tokenizer.eos_token), tiny.tokenizer, 3)
    words = spoken(tiny, ids)
    system = words[1]
    assert system.startswith("A chat between") and system.endswith("user's questions.")  # one token
    assert words == [
        *("<s>", system, "USER", ":", "<image>", "<image>", "<image>", "\n"),
        *("What colour is it?", "ASSISTANT", ":", "red", "</s>"),
        *("USER", ":", "And", "grass", "?", "ASSISTANT", ":", "green", "blue", "</s>"),
    ]
    learned = ["" if label == IGNORED else word for word, label in zip(words, labels, strict=True)]
    assert learned == [*[""] * 11, "red", "</s>", *[""] * 7, "green", "blue", "</s>"]
    kept = [(number, label) for number, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert all(number == label for number, label in kept)


def test_of_a_plain_record_the_caption_alone_is_learned(tiny: LanguageModel) -> None:
    record = Record("1", "red.png", (Turn("", "red is blue"),))
    ids, labels = tokenize(pieces(record, "plain", tiny.tokenizer.eos_token), tiny.tokenizer, 2)
    assert spoken(tiny, ids) == ["<s>", "<image>", "<image>", "red", "is", "blue", "\n"]
    assert labels == [IGNORED, IGNORED, IGNORED, *ids[3:]]


def test_a_token_across_the_border_is_not_learned(tiny: LanguageModel) -> None:
    parts = [Piece("What colour ", False), Piece("is it?", True)]  # one token of the tiny tokenizer
    assert tokenize(parts, tiny.tokenizer, 0)[1] == [IGNORED, IGNORED]


def test_samples_carry_their_image_and_are_cut(
    tiny: LanguageModel, records: list[Record], shown: object
) -> None:
    data = Conversations(records, "v1", tiny.tokenizer, shown, longest=9)  # type: ignore[arg-type]
    assert len(data) == 5
    assert data.modalities() == [True] * 4 + [False]
    assert data.lengths() == [9, 9, 9, 9, 8]  # words, and four tokens of an image
    assert data[0].image is not None and data[0].image.shape == (4, 3)
    assert data[4].image is None
    assert [len(data[place].ids) for place in (0, 4)] == [9, 9]
    assert torch.equal(data[4].ids, Conversations(records, "v1", tiny.tokenizer, None, 99)[4].ids[:9])


def test_batches_are_filled_up(tiny: LanguageModel) -> None:
    image = torch.ones(4, 3)
    short = TrainingSample(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]), image)
    long = TrainingSample(torch.tensor([7, 8, 9]), torch.tensor([IGNORED, 8, 9]), None)
    batch = collate([short, long], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]
    assert batch["pixel_values"].shape == (1, 4, 3)
    assert "pixel_values" not in collate([long], 0)
    left = pad([short.ids, long.ids], 0, left=True)
    assert left["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_shuffled_images(records: list[Record], tiny: LanguageModel, shown: Any) -> None:
    names = [record.image for record in records if record.image is not None]
    shuffled = shuffle_images(records, names, seed=1)
    assert shuffled == shuffle_images(records, names, seed=1) != records
    assert sorted(record.image for record in shuffled[:-1]) == sorted(names)
    assert [(record.id, record.turns) for record in shuffled] == [(r.id, r.turns) for r in records]
    assert shuffled[-1] == records[-1]  # without an image
    sample = Conversations(shuffled, "v1", tiny.tokenizer, shown, 99)[0]
    assert torch.equal(sample.image, shown[shuffled[0].image])
    with pytest.raises(KeyError):
        shuffle_images(records, names[1:], seed=1)


LENGTHS = [7 * n % 23 for n in range(50)]
MODALITIES = [n % 3 != 0 for n in range(50)]


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_an_epoch_holds_everything_once_in_batches_of_one_modality(batch: int) -> None:
    found = epoch_order(LENGTHS, MODALITIES, batch, seed=3, epoch=0)
    assert sorted(found) == list(range(50))
    whole = sum(MODALITIES) // batch + (50 - sum(MODALITIES)) // batch
    for start in range(0, whole * batch, batch):
        part = found[start : start + batch]
        assert len({MODALITIES[place] for place in part}) == 1
        assert [LENGTHS[place] for place in part] == sorted((LENGTHS[p] for p in part), reverse=True)


def test_the_seed_and_the_epoch_decide() -> None:
    orders = {tuple(epoch_order(LENGTHS, MODALITIES, 4, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert epoch_order(LENGTHS, MODALITIES, 4, 1, 1) == epoch_order(LENGTHS, MODALITIES, 4, 1, 1)


def test_steps_go_through_epochs() -> None:
    found = sample_order(LENGTHS, MODALITIES, 4, 30, seed=0)
    assert len(found) == 120
    assert found[:50] == epoch_order(LENGTHS, MODALITIES, 4, 0, 0)
    assert found[100:] == epoch_order(LENGTHS, MODALITIES, 4, 0, 2)[:20]


@pytest.fixture
def folder(tmp_path: Path, png: Callable[[int, int], bytes]) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(png(0, 0))
    (tmp_path / "images" / "deep" / "b.png").write_bytes(png(2, 1))
    return tmp_path / "images"


def test_a_folder_and_a_tar_file_hold_the_same(
    folder: Path, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    members = [(f"./{n}", (folder / n).read_bytes()) for n in ("deep/b.png", "a.png")]
    shard = make_shard(tmp_path / "images.tar", members)
    loose, packed = NamedImages(folder), NamedImages(shard)
    for images in (loose, packed):
        assert "deep/b.png" in images and "c.png" not in images and 3 not in images
    names = ["deep/b.png", "a.png", "a.png"]
    ours, theirs = loose.source(names), packed.source(names)
    assert ours.keys == theirs.keys == ("a.png", "deep/b.png")
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.name, theirs.name) == ("images", "images.tar")
    assert torch.equal(ours.read(1), theirs.read(1))


def test_a_folder_is_listed_once_and_only_files_are_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "deep" / "link.png").symlink_to(folder / "a.png")
    (folder / "deep" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "deep" / "loop.png").symlink_to("loop.png")
    (folder / "deep" / unicodedata.normalize("NFD", "é.png")).touch()
    listed: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: [listed.append(path), scandir(path)][1])
    images = NamedImages(folder)
    names = ["deep/b.png", "deep/link.png", "./deep/b.png", "deep//b.png", "a.png", "deep/é.png"]
    others = [
        "deep",
        "deep/gone.png",
        "deep/loop.png",
        "no/b.png",
        "no/c.png",
        "a.png/b",
        "",
        "x\0/y",
        "é.png",
    ]
    assert [name in images for name in (*names, *others)] == [True] * len(names) + [False] * len(others)
    assert [name for name in (*names, *others) if os.path.isfile(folder / name)] == names[:-1]  # noqa: PTH113
    assert listed.count(folder / "deep") == 1 and listed.count(folder / "no") == 1


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or tar file of images"):
        NamedImages(tmp_path / "absent")
    with pytest.raises(DataError, match=r"there is no image 'c.png'"):
        NamedImages(folder).source(["c.png"])
    assert "../images/a.png" not in NamedImages(folder)
    (tmp_path / "x.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="not a tar file without compression"):
        _ = "a" in NamedImages(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("image", "size", "padded"),
    [
        ((4, 10), (8, 8), (10, 10)),
        ((10, 4), (8, 8), (10, 10)),
        ((4, 4), (8, 16), (4, 8)),
        ((6, 6), (3, 3), (6, 6)),
    ],
)
def test_padding_to_the_aspect_of_the_size(
    image: tuple[int, int], size: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels = torch.randint(0, 256, (3, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = pad_image(pixels, size)
    assert found.shape == (3, *padded)
    top, left = (padded[0] - image[0]) // 2, (padded[1] - image[1]) // 2
    assert torch.equal(found[:, top : top + image[0], left : left + image[1]], pixels)
    outside = torch.ones(padded, dtype=torch.bool)
    outside[top : top + image[0], left : left + image[1]] = False
    colour = torch.tensor([int(255 * part) for part in PADDING], dtype=torch.uint8)
    assert (found[:, outside] == colour[:, None]).all()


def test_a_padded_source_is_another_source(folder: Path) -> None:
    source = NamedImages(folder).source(["deep/b.png"])
    padded = PaddedImages(source, (32, 32))
    assert source.read(0).shape == (3, 20, 22)
    assert padded.read(0).shape == (3, 22, 22)
    assert padded.keys == source.keys and padded.labels.tolist() == [0] and padded.classes == ("",)
    assert padded.fingerprint != source.fingerprint


def test_no_name_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    images = NamedImages(folder)
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "deep/../../secret.png",
        "a\0.png",
        "x" * 5000,
    ):
        assert name not in images
    assert "link.png" in images and "./a.png" in images and "deep" not in images


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_in_either_form(
    stored: Any, tmp_path: Path, png: Callable[[int, int], bytes], make_shard: Callable[..., Path]
) -> None:
    name = unicodedata.normalize(stored, "é.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(png(0, 0))
    shard = make_shard(tmp_path / "images.tar", [(name, png(0, 0))])
    for form in ("NFC", "NFD"):
        asked = unicodedata.normalize(form, "é.png")
        assert asked in NamedImages(tmp_path / "images") and asked in NamedImages(shard)
        assert NamedImages(tmp_path / "images").source([asked]).read(0).shape[0] == 3


def test_tar_files_that_are_damaged(tmp_path: Path, png: Callable[[int, int], bytes]) -> None:
    def headers(*sizes: int) -> Path:
        path = tmp_path / "images.tar"
        with path.open("wb") as file:
            for number, size in enumerate(sizes):
                member = tarfile.TarInfo(f"{number % 2}.png")
                member.size = size
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                file.write(bytes(512))
        return path

    for sizes, message in (
        ((10, -512), r"1\.png is said to have -512 bytes"),
        ((10, 10**15), r"1\.png is said to have 1000000000000000 bytes"),
        ((10, 10, 10), r"holds 0\.png twice"),
    ):
        with pytest.raises(DataError, match=message):
            _ = "0.png" in NamedImages(headers(*sizes))


def test_vicunas_conversation_to_the_letter() -> None:
    assert format_prompt("What is it?", has_image=True) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert format_prompt("What is it?", has_image=False) == f"{SYSTEM} USER: What is it? ASSISTANT:"


def test_the_mark_is_no_part_of_a_question() -> None:
    with pytest.raises(DataError, match="holds the mark <image> itself"):
        format_prompt("What is <image>?", has_image=True)


def test_the_benchmarks_prompts() -> None:
    end = "\nAnswer the question using a single word or phrase."
    assert short("Is it?") == f"Is it?{end}"
    assert short_with_ocr("what is NASA?", None) == f"What is NASA?{end}"
    assert short_with_ocr("what?", ["A", "b c"]) == f"What?\nReference OCR token: A, b c{end}"
    assert short_with_ocr("", []) == f"\nReference OCR token: {end}"
    last = "Answer with the option's letter from the given choices directly."
    assert choose("Which?", ["x", "y"], "") == f"Which?\nA. x\nB. y\n{last}"
    assert choose("Which?", ["x"], "So.") == f"Context: So.\nWhich?\nA. x\n{last}"
