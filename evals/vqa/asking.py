"""Run a trained LLaVA on a benchmark: with the images, and blind."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .course import Course
from .exams import Answers
from .generation import Generator, answer_all, prepare
from .images import Images
from .samples import VisionInputs
from .tasks import TaskData

_FORMAT = "am-radio-vqa-answers/2"


def ask_all(course: Course, model: Any, key: str, data: TaskData) -> Answers:
    """Answer all questions of a benchmark, taking from the cache those that are already in it.

    Args:
        key: a hash of all that decided the model's weights.

    Raises:
        DataError: an image that cannot be read, or ranks that do not share the cache.
    """
    settings, preset = course.settings, course.preset
    images = Images(data.check_images())
    names = {question.image for question in data.questions if question.image is not None}
    memo = course.encoder.cache / "fingerprints"
    source = images.source(names, memo) if names else None
    shown: VisionInputs | None = course.encoder.show(source, preset.instruct.view) if source else None
    speaker = Generator(
        model=model.to(course.device),
        language=course.language,
        shown=shown,
        device=course.device,
        new_tokens=preset.new_tokens,
        batch=settings.answer_batch or preset.answer_batch,
        bf16=settings.precision == "bf16",
    )
    is_blind_too = preset.blind if settings.blind is None else settings.blind
    said = []
    for blind in (False, True) if is_blind_too else (False,):
        asked = [prepare(question, blind=blind) for question in data.questions]
        content = [_FORMAT, key, source.fingerprint if source else "", preset.new_tokens, blind, asked]
        folder = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        said.append(
            answer_all(
                asked,
                speaker,
                course.encoder.cache / "vqa" / "answers" / folder,
                title=f"{data.task}{' blind' if blind else ''} {course.encoder.model.name}",
                group=course.group,
                watch=course.watch,
                damage=course.encoder.damage,
            )
        )
    return Answers(*said)
