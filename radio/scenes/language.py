"""Text about a scene: captions from templates, and questions whose answers are balanced over the world."""

from typing import Literal, NamedTuple, get_args

import numpy as np

from .drawing import SHAPES
from .world import CLASSES, COLOURS, Scene, SceneObject, Split, generator

TEMPLATES: tuple[str, ...] = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "this is a {}",
    "there is a {} here",
    "i see a {}",
    "one big {}",
    "the big thing is a {}",
)
"""Caption templates of the main object; filled with a class name, also the zero-shot prompts."""

_SUFFIXES: tuple[str, ...] = ("and a small {}", "with a small {}", "plus a small {}")

VOCABULARY: tuple[str, ...] = tuple(
    sorted(set(" ".join((*TEMPLATES, *_SUFFIXES, *COLOURS, *SHAPES)).split()) - {"{}"})
)
"""Every word that captions use; a caption has at most 12 of them."""

Kind = Literal["colour", "shape", "count", "position", "exists"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Shares of scenes with 1, 2, 3 and 4 objects, counted over 120,000 scenes: the question is asked in inverse
# proportion to the share of its answer, so that every number is the answer equally often.
_COUNT_SHARES = (0.2529, 0.2554, 0.2605, 0.2312)
_SIDE_MARGIN = 0.04  # of the side: an object closer to the middle line is on neither side

_CAPTION_STREAM, _QUESTION_STREAM = 2, 3


class Question(NamedTuple):
    """A question about one scene with its one-word answer."""

    kind: Kind
    text: str
    answer: str


def caption(scene: Scene, index: int, *, split: Split = "train", seed: int = 0) -> str:
    """Make the caption chosen by (index, split, seed): it names the main and at most one small object."""
    draws = generator(index, split=split, seed=seed, stream=_CAPTION_STREAM).random(3)
    template = TEMPLATES[int(draws[0] * len(TEMPLATES))]
    suffix = _SUFFIXES[int(draws[1] * len(_SUFFIXES))]
    return _say(scene, template, suffix, int(draws[2] * len(scene.objects)))


def captions(scene: Scene) -> tuple[str, ...]:
    """Make one caption per template, cycling through no other object and each small one."""
    return tuple(
        _say(scene, template, _SUFFIXES[i % len(_SUFFIXES)], i % len(scene.objects))
        for i, template in enumerate(TEMPLATES)
    )


def questions(scene: Scene, index: int, *, split: Split = "train", seed: int = 0) -> tuple[Question, ...]:
    """Make three to five questions about one scene, chosen by (index, split, seed).

    Over the world, each kind's answers are equally frequent, so that a question's words do not reveal its
    answer:

    - colour and shape: of the main object, whose classes are drawn in equal numbers;
    - exists: yes or no with equal chance; both then name uniformly drawn pairs of colour and shape;
    - position: of the main object, whose place is uniform; skipped close to the middle;
    - count: asked in inverse proportion to the frequency of the answer.
    """
    source = generator(index, split=split, seed=seed, stream=_QUESTION_STREAM)
    main = scene.objects[0]
    colour, shape = COLOURS[main.colour], SHAPES[main.shape]
    made = [
        Question("colour", f"What colour is the big {shape}?", colour),
        Question("shape", f"What shape is the big {colour} object?", shape),
        _exists(scene, source),
        _position(scene, source),
        _count(scene, source),
    ]
    return tuple(question for question in made if question is not None)


def _name(item: SceneObject) -> str:
    return f"{COLOURS[item.colour]} {SHAPES[item.shape]}"


def _say(scene: Scene, template: str, suffix: str, other: int) -> str:
    """Fill the template with the main object, and the suffix with objects[other] unless `other` is 0."""
    sentence = template.format(CLASSES[scene.label])
    return f"{sentence} {suffix.format(_name(scene.objects[other]))}" if other else sentence


def _exists(scene: Scene, source: np.random.Generator) -> Question:
    coin, pick, which, *others = source.random(3 + 64).tolist()
    item = scene.objects[int(pick * len(scene.objects))]
    if coin < 0.5:
        return Question("exists", f"Is there a {_name(item)}?", "yes")
    present = {(seen.colour, seen.shape) for seen in scene.objects}
    absent = (
        (item.colour, int(u * len(SHAPES))) if which < 0.5 else (int(u * len(COLOURS)), item.shape)
        for u in others
    )
    colour, shape = next(pair for pair in absent if pair not in present)
    return Question("exists", f"Is there a {COLOURS[colour]} {SHAPES[shape]}?", "no")


def _position(scene: Scene, source: np.random.Generator) -> Question | None:
    axis = int(source.random() * 2)
    main = scene.objects[0]
    middle = (main.box[axis] + main.box[axis + 2]) / 2 / scene.image.shape[-1] - 0.5
    if abs(middle) < _SIDE_MARGIN:
        return None
    low, high = (("left", "right"), ("top", "bottom"))[axis]
    words = "on the left or on the right" if axis == 0 else "at the top or at the bottom"
    return Question("position", f"Is the {_name(main)} {words}?", low if middle < 0 else high)


def _count(scene: Scene, source: np.random.Generator) -> Question | None:
    share = _COUNT_SHARES[len(scene.objects) - 1]
    if source.random() >= min(_COUNT_SHARES) / share:
        return None
    return Question("count", "How many objects are there?", str(len(scene.objects)))
