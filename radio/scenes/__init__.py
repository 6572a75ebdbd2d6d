"""The generated world: seeded images with classes, captions, masks and questions, and their writers."""

from .domains import DOMAINS, Domain, render_domain
from .drawing import SHAPES
from .export import write
from .language import KINDS, TEMPLATES, VOCABULARY, Question, caption, captions, questions
from .world import CLASSES, COLOURS, Scene, SceneError, Split, label_of, render, render_images, semantic

__all__ = [
    "CLASSES",
    "COLOURS",
    "DOMAINS",
    "KINDS",
    "SHAPES",
    "TEMPLATES",
    "VOCABULARY",
    "Domain",
    "Question",
    "Scene",
    "SceneError",
    "Split",
    "caption",
    "captions",
    "label_of",
    "questions",
    "render",
    "render_domain",
    "render_images",
    "semantic",
    "write",
]
