from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.zeroshot.names import imagenet_names, name_classes, read_templates
from radio.errors import DataError


class Source:
    """What naming looks at."""

    name = "pictures"

    def __init__(self, *classes: str) -> None:
        self.classes = classes
        self.labels = np.array([len(classes) - 1, 0])


def names_of(source: Any, wanted: str | None = None) -> list[str]:
    """What the two pictures are called."""
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
        (("ant", "bee", "cat"), "has 3 names for the 2 classes of pictures, and none is 'fire_engine'"),
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
    with pytest.raises(DataError, match="not a text file"):
        name_classes(Source("a", "b"), str(tmp_path / "binary"))


def test_imagenet_has_998_distinct_names() -> None:
    assert (len(imagenet_names()), len(set(imagenet_names()))) == (1000, 998)


def test_templates_from_a_file(tmp_path: Path) -> None:
    assert read_templates(write(tmp_path, "a {}.", "{the} {}"), scenes=False) == ("a {}.", "{the} {}")
    with pytest.raises(DataError, match=r"template 2 is 'a thing'; wanted \{\} once"):
        read_templates(write(tmp_path, "a {}.", "a thing"), scenes=False)
    with pytest.raises(DataError, match="no such file of templates"):
        read_templates("opanai", scenes=False)
