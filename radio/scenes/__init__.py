"""The generated world: seeded images with classes, captions, masks and questions, and their writers."""

from .drawing import SHAPES
from .export import LAYOUTS, write
from .language import KINDS, TEMPLATES, VOCABULARY, Question, caption, captions, questions
from .world import (
    CLASSES,
    COLOURS,
    SPLITS,
    Scene,
    SceneError,
    SceneObject,
    Split,
    label_of,
    render,
    render_images,
    semantic,
)

__all__ = [
    "CLASSES",
    "COLOURS",
    "KINDS",
    "LAYOUTS",
    "SHAPES",
    "SPLITS",
    "TEMPLATES",
    "VOCABULARY",
    "Question",
    "Scene",
    "SceneError",
    "SceneObject",
    "Split",
    "caption",
    "captions",
    "label_of",
    "questions",
    "render",
    "render_images",
    "semantic",
    "write",
]
