"""The generated world's conversations: true, and no turn gives a later answer away."""

from __future__ import annotations

import json
from pathlib import Path

from evals.vqa.conversations import read_records
from evals.vqa.images import Images
from evals.vqa.scenes_mix import IMAGES, INSTRUCT, PRETRAIN, Mix, conversations_about, write_mix
from radio.scenes import COLOURS, SHAPES, render


def test_answers_are_true_and_not_told_before() -> None:
    kinds = set()
    for index in range(40):
        scene = render(index, split="train", seed=0)
        main = scene.objects[0]
        truth = (COLOURS[main.colour], SHAPES[main.shape])
        for talk in conversations_about(scene, index, 0):
            said = ""
            for question, answer in talk:
                kinds.add(question.split()[0])
                if "What colour" in question or "What shape" in question:
                    word = truth["What shape" in question]
                    lines = dict(line.split(". ", 1) for line in question.splitlines() if line[1:2] == ".")
                    assert lines.get(answer, answer) == word
                    assert word not in said.split()
                if question.startswith("How many"):
                    assert answer == str(len(scene.objects))
                said += f" {question.split(chr(10))[0].rstrip('?')} {answer}"
    assert kinds == {"What", "Is", "How", "Context:"}


def test_the_files_are_llavas_and_are_written_once(tmp_path: Path) -> None:
    write_mix(tmp_path, Mix(count=3))
    images = Images(tmp_path / IMAGES)
    captions = read_records(tmp_path / PRETRAIN, images.__contains__).records
    talks = read_records(tmp_path / INSTRUCT, images.__contains__).records
    assert len(captions) == 3 and len(talks) > 15
    assert {record.image for record in talks} - {None} == {record.image for record in captions}
    assert 0 < sum(record.image is None for record in talks) <= len(talks) / 8
    before = (tmp_path / INSTRUCT).stat().st_mtime_ns
    write_mix(tmp_path, Mix(count=3))
    assert (tmp_path / INSTRUCT).stat().st_mtime_ns == before
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert len(metadata.pop("digest")) == 64
    assert metadata == {"count": 3, "seed": 0, "size": 96, "version": 5}
