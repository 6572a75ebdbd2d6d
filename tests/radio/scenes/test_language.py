from collections import Counter
from itertools import pairwise

import pytest

from radio.scenes import (
    CLASSES,
    COLOURS,
    KINDS,
    SHAPES,
    TEMPLATES,
    VOCABULARY,
    Question,
    Scene,
    caption,
    captions,
    questions,
    render,
)


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return [render(index, size=32) for index in range(2400)]


@pytest.fixture(scope="module")
def asked(world: list[Scene]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for index, scene in enumerate(world) for question in questions(scene, index)]


def pairs_named(text: str) -> set[str]:
    words = text.replace("?", "").split()
    return {f"{a} {b}" for a, b in pairwise(words) if a in COLOURS and b in SHAPES}


def test_the_vocabulary_is_small_and_closed(world: list[Scene]) -> None:
    assert len(TEMPLATES) >= 6
    assert len(VOCABULARY) <= 40
    assert {*COLOURS, *SHAPES} <= set(VOCABULARY)
    for scene in world[:300]:
        for text in captions(scene):
            assert set(text.split()) <= set(VOCABULARY)
            assert len(text.split()) <= 14  # with a start and an end mark: 16 tokens


def test_captions_name_the_main_object_and_only_what_is_there(world: list[Scene]) -> None:
    for index, scene in enumerate(world[:300]):
        present = {f"{COLOURS[o.colour]} {SHAPES[o.shape]}" for o in scene.objects}
        for text in (caption(scene, index), *captions(scene)):
            assert CLASSES[scene.label] in pairs_named(text)
            assert pairs_named(text) <= present
        assert len(set(captions(scene))) == len(TEMPLATES)


def test_every_template_and_small_objects_occur(world: list[Scene]) -> None:
    said = [caption(scene, index) for index, scene in enumerate(world[:600])]
    starts = Counter(
        next(t for t in sorted(TEMPLATES, key=len, reverse=True) if text.startswith(t.split("{}")[0]))
        for text in said
    )
    assert set(starts) == set(TEMPLATES)
    assert 0.25 < sum("small" in text for text in said) / 600 < 0.75


def test_words_are_decided_by_index_split_and_seed(world: list[Scene]) -> None:
    scene = world[1]
    assert caption(scene, 1) == caption(scene, 1)
    assert questions(scene, 1) == questions(scene, 1)
    assert len({caption(scene, index) for index in range(40)}) > 5
    assert len({caption(scene, 1, seed=seed, split="val") for seed in range(40)}) > 5


def test_answers_are_true(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        main = scene.objects[0]
        present = {f"{COLOURS[o.colour]} {SHAPES[o.shape]}" for o in scene.objects}
        x, y = (main.box[0] + main.box[2]) / 64, (main.box[1] + main.box[3]) / 64
        truth = {
            "colour": COLOURS[main.colour],
            "shape": SHAPES[main.shape],
            "count": str(len(scene.objects)),
            "exists": "yes" if pairs_named(question.text) <= present else "no",
            "position": ("left" if x < 0.5 else "right")
            if "left" in question.text
            else "top"
            if y < 0.5
            else "bottom",
        }
        assert question.answer == truth[question.kind]


def test_answers_are_balanced_over_the_world(asked: list[tuple[Scene, Question]]) -> None:
    """Every answer's share lies within four standard errors (and 2 %) of an equal share."""
    sizes = {"colour": 6, "shape": 10, "count": 4, "position": 4, "exists": 2}
    for kind in KINDS:
        counts = Counter(question.answer for _, question in asked if question.kind == kind)
        total, share = sum(counts.values()), 1 / sizes[kind]
        assert len(counts) == sizes[kind]
        tolerance = 4 * (share * (1 - share) / total) ** 0.5 + 0.02 * share
        for answer, count in counts.items():
            assert count / total == pytest.approx(share, abs=tolerance), (kind, answer)


def test_the_words_of_an_exists_question_do_not_tell_its_answer(asked: list[tuple[Scene, Question]]) -> None:
    """For each colour and each shape named, yes and no are both common."""
    found = [
        (question.text[:-1].split()[-2:], question.answer)
        for _, question in asked
        if question.kind == "exists"
    ]
    for word in (*COLOURS, *SHAPES):
        answers = [answer for words, answer in found if word in words]
        assert 0.36 < answers.count("yes") / len(answers) < 0.64


def test_objects_near_the_middle_are_not_asked_about(world: list[Scene]) -> None:
    kinds = Counter(
        question.kind for index, scene in enumerate(world) for question in questions(scene, index)
    )
    assert kinds["colour"] == kinds["shape"] == kinds["exists"] == len(world)
    assert 0.6 * len(world) < kinds["position"] < len(world)
    assert 0.8 * len(world) < kinds["count"] < len(world)
