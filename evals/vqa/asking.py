"""A trained LLaVA before a benchmark: with the pictures, and blind."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .course import Course
from .exams import Answers
from .generation import Speaker, answer_all, prepare
from .pictures import Pictures
from .samples import Shown
from .tasks import TaskData

_FORMAT = "am-radio-vqa-answers/2"


def ask_all(course: Course, model: Any, key: str, data: TaskData) -> Answers:
    """The answers to all questions of a benchmark, from the cache as far as they are there.

    Args:
        key: a hash of all that decided the model's weights.

    Raises:
        DataError: a picture that cannot be read, or ranks that do not share the cache.
    """
    settings, preset = course.settings, course.preset
    pictures = Pictures(data.check_images())
    names = {question.image for question in data.questions if question.image is not None}
    memo = course.encoder.cache / "fingerprints"
    source = pictures.source(names, memo) if names else None
    shown: Shown | None = course.encoder.show(source, preset.instruct.view) if source else None
    speaker = Speaker(
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
