from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.zeroshot.data import imagenet_names, name_classes, read_templates
from radio.errors import DataError


class Source:
    """What naming looks at."""

    name = "images"

    def __init__(self, *classes: str) -> None:
        self.classes = classes
        self.labels = np.array([len(classes) - 1, 0])


def names_of(source: Any, wanted: str | None = None) -> list[str]:
    """What the two images are called."""
    named = name_classes(source, wanted)
    return [named.names[label] for label in named.labels]


def write(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(lines) + "\n\n")
    return str(path)


def test_folders_name_their_classes() -> None:
    named = name_classes(Source("fire_engine", "owl"))
    assert named.names == ("fire engine", "owl")
    assert named.labels.tolist() == [1, 0]


def test_wordnet_ids_are_imagenets_names() -> None:
    assert names_of(Source("n01443537", "n02123045")) == ["tabby cat", "goldfish"]
    assert len(name_classes(Source("n01443537", "n02123045")).names) == 2
    every = name_classes(Source("n01443537", "n02123045"), "imagenet")
    assert len(every.names) == 1000 and every.labels.tolist() == [281, 1]
    with pytest.raises(DataError, match="n99999999 is none of ImageNet's 1000 classes"):
        name_classes(Source("n01443537", "n99999999"))


def test_numbered_classes_are_places_in_the_names(tmp_path: Path) -> None:
    assert names_of(Source("1", "281"), "imagenet") == ["tabby cat", "goldfish"]
    assert names_of(Source("0", "2"), write(tmp_path, "ant", "bee", "cat")) == ["cat", "ant"]
    with pytest.raises(DataError, match="are numbers, not names; give --class-names imagenet"):
        name_classes(Source("1", "281"))
    with pytest.raises(DataError, match=r"has a class 7, and .* names classes 0 to 1"):
        name_classes(Source("0", "7"), write(tmp_path, "ant", "bee"))


def test_a_file_is_matched_by_name_or_by_order(tmp_path: Path) -> None:
    shuffled = write(tmp_path, "owl", "Fire engine", "cat")
    assert names_of(Source("fire_engine", "owl"), shuffled) == ["owl", "Fire engine"]
    foreign = write(tmp_path, "truck of the fire brigade", "bird of the night")
    assert names_of(Source("fire_engine", "owl"), foreign) == [
        "bird of the night",
        "truck of the fire brigade",
    ]
    assert names_of(Source("goldfish", "tench"), "imagenet") == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("ant", "bee", "cat"), "has 3 names for the 2 classes of images, and none is 'fire_engine'"),
        (("owl", "fire engines"), "none is 'fire_engine'; did you mean fire engines"),
        ((), "holds no class names"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        name_classes(Source("fire_engine", "owl"), write(tmp_path, *lines))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of class names"):
        name_classes(Source("a", "b"), "nowhere.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        name_classes(Source("a", "b"), str(tmp_path / "binary"))


def test_imagenet_has_998_distinct_names() -> None:
    assert (len(imagenet_names()), len(set(imagenet_names()))) == (1000, 998)


def test_templates_from_a_file(tmp_path: Path) -> None:
    assert read_templates(write(tmp_path, "a {}.", "{the} {}"), scenes=False) == ("a {}.", "{the} {}")
    with pytest.raises(DataError, match=r"template 2 is 'a thing'; wanted \{\} once"):
        read_templates(write(tmp_path, "a {}.", "a thing"), scenes=False)
    with pytest.raises(DataError, match="no such file of templates"):
        read_templates("opanai", scenes=False)


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_names_and_templates_of_any_editor(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(end.join(["bee", "ant\u2028s", DECOMPOSED, ""]).encode(encoding))
    assert name_classes(Source("a", "b", "c"), str(path)).names == ("bee", "ant\u2028s", COMPOSED)
    path.write_bytes(end.join(["a {}.", "{} %s, [x]"]).encode(encoding))
    assert read_templates(str(path), scenes=False) == ("a {}.", "{} %s, [x]")


@pytest.mark.parametrize(("folder", "line"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_accents_match_however_they_are_written(tmp_path: Path, folder: str, line: str) -> None:
    assert names_of(Source("bar", folder), write(tmp_path, line, "bar")) == [COMPOSED, "bar"]
    assert name_classes(Source(folder, "bar")).names == (COMPOSED, "bar")


def test_names_follow_numbered_folders_by_number(tmp_path: Path) -> None:
    classes = sorted(f"class_{number}" for number in range(12))
    lines = [f"thing {number}" for number in range(12)]
    named = name_classes(Source(*classes), write(tmp_path, *lines))
    found = {name: named.names[place] for name, place in zip(classes, _places(named, 12), strict=True)}
    assert found == {f"class_{number}": f"thing {number}" for number in range(12)}
    assert "class_0, class_1, class_2, class_3, …" in named.notes[0]
    padded = [f"class_{number:02d}" for number in range(12)]
    assert name_classes(Source(*padded), write(tmp_path, *lines)).notes == ()


def _places(named: Any, count: int) -> list[int]:
    """The place of each class, of which the source gives the last and the first."""
    assert named.labels[1] == 0 and count == 12
    return [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_capitals_tell_letters_apart(tmp_path: Path) -> None:
    assert names_of(Source("A", "a"), write(tmp_path, "a", "A")) == ["a", "A"]
    assert name_classes(Source("A", "a")).names == ("A", "a")


@pytest.mark.parametrize(
    ("classes", "lines", "said"),
    [
        (("fire_engine", "fire engine"), None, "'fire_engine' and 'fire engine' would be one class"),
        ((COMPOSED, DECOMPOSED), None, "would be one class"),
        (("owl", "Owl"), ("owl", "bee"), "'owl' and 'Owl' would be one class"),
        (("crane", "owl"), ("crane", "owl", "crane"), r"the name 'crane' 2 times \(as 1 and 3\)"),
        (("owl", "sunglasses"), "imagenet", r"the name 'sunglasses' 2 times \(as \d+ and \d+\)"),
        (("1", "01"), ("ant", "bee"), "'1' and '01' would be one class"),
    ],
)
def test_two_of_one_name_are_refused(
    tmp_path: Path, classes: tuple[str, ...], lines: tuple[str, ...] | str | None, said: str
) -> None:
    wanted = write(tmp_path, *lines) if isinstance(lines, tuple) else lines
    with pytest.raises(DataError, match=said):
        name_classes(Source(*classes), wanted)


def test_lists_of_other_peoples_layouts(tmp_path: Path) -> None:
    synsets = Source("n01440764", "n02123045")
    assert names_of(synsets, write(tmp_path, "n02123045 tabby, tabby cat", "n01440764 tench")) == [
        "tabby, tabby cat",
        "tench",
    ]
    path = tmp_path / "names.json"
    path.write_text('["bee", "ant"]', encoding="utf-8-sig")
    assert names_of(Source("a", "b"), str(path)) == ["ant", "bee"]
    path.write_text('{"1": ["n02123045", "tabby_cat"], "0": ["n01440764", "tench"]}')
    assert names_of(synsets, str(path)) == ["tabby cat", "tench"]
    assert names_of(Source("0", "1"), str(path)) == ["tabby cat", "tench"]


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "[3]",
        '[""]',
        "[]",
        '{"a": "b"}',
        '{"0": 1}',
        '{"0": "a", "0": "b"}',
        "[" * 100_000,
        "ant",
        "[null]",
    ],
)
def test_json_that_is_no_list_of_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(DataError, match=r"names\.json"):
        name_classes(Source("a", "b"), str(tmp_path / "names.json"))


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=40),
        st.lists(st.sampled_from(["a", "b", "A", "1", "é", "", "[x"])).map(
            lambda lines: "\n".join(lines).encode()
        ),
    ),
    ending=st.sampled_from(["txt", "json"]),
    classes=st.sampled_from([("a", "b"), ("0", "1"), ("n01440764", "n02123045"), ("a_2", "a_10")]),
)
def test_any_file_gives_names_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str, classes: tuple[str, ...]
) -> None:
    path = tmp_path_factory.mktemp("names") / f"names.{ending}"
    path.write_bytes(content)
    for read in (
        lambda: name_classes(Source(*classes), str(path)),
        lambda: read_templates(str(path), scenes=False),
    ):
        with suppress(DataError):
            read()


@pytest.mark.parametrize("what", ["folder", "pipe", "loop", "nul"])
def test_what_is_no_file_is_an_error_and_no_wait(tmp_path: Path, what: str) -> None:
    path = tmp_path / "names.txt"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    wanted = "\0" if what == "nul" else str(path)
    with pytest.raises(DataError, match="of class names"):
        name_classes(Source("a", "b"), wanted)
    with pytest.raises(DataError, match="of templates"):
        read_templates(wanted, scenes=False)


@pytest.mark.parametrize(
    "lines", [("0 tench", "1 goldfish"), ("1: tench", "2: goldfish"), ("0,tench", "1,goldfish")]
)
def test_numbers_of_a_label_map_are_no_names(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert names_of(Source("a", "b"), write(tmp_path, *lines)) == ["goldfish", "tench"]


def test_numbers_that_do_not_count_up_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"do not count up from 0 or 1 \(line 1 has 7, line 2 3\)"):
        name_classes(Source("a", "b"), write(tmp_path, "7 tench", "3 goldfish"))


def test_marks_of_python_or_json_are_no_part_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "templates.json"
    file.write_text('["a {}.", "the {}"]', encoding="utf-8")
    assert read_templates(str(file), scenes=False) == ("a {}.", "the {}")
    with pytest.raises(DataError, match="its lines are in quotation marks"):
        read_templates(write(tmp_path, "'a photo of a {}.',", "'a drawing of a {}.',"), scenes=False)
