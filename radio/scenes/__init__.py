"""The generated world: seeded images with classes, captions, masks and questions, and their writers."""

from .domains import DOMAINS, Domain, render_domain
from .drawing import SHAPES
from .export import write
from .language import KINDS, TEMPLATES, VOCABULARY, Question, caption, captions, questions
from .world import (
    CLASSES,
    COLOURS,
    Pose,
    Scene,
    SceneError,
    SceneView,
    Split,
    depth,
    label_of,
    move_points,
    render,
    render_images,
    render_view,
    semantic,
)

__all__ = [
    "CLASSES",
    "COLOURS",
    "DOMAINS",
    "KINDS",
    "SHAPES",
    "TEMPLATES",
    "VOCABULARY",
    "Domain",
    "Pose",
    "Question",
    "Scene",
    "SceneError",
    "SceneView",
    "Split",
    "caption",
    "captions",
    "depth",
    "label_of",
    "move_points",
    "questions",
    "render",
    "render_domain",
    "render_images",
    "render_view",
    "semantic",
    "write",
]
