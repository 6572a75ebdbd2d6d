"""A model of open_clip from a local file, through the evaluator and through the library alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from evals.core.evaluator import run_evaluator
from evals.core.task import make_evaluator
from evals.zeroshot import ZeroshotSettings
from radio.data import open_source
from radio.hub import load_backbone
from radio.images import evaluation_view
from radio.teachers.openclip import OPENAI_MEAN, OPENAI_STD

NAME = "radio-tiny-zeroshot"


def test_scores_equal_the_librarys_own_way(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 56, "layers": 2, "width": 128, "patch_size": 14},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(NAME, pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    query = make_folder(tmp_path / "val", classes=6, count=4)
    settings = ZeroshotSettings(query=str(query), templates="simple")
    teacher = load_backbone(f"openclip:{NAME}@{tmp_path / 'weights.pt'}")
    report = run_evaluator(make_evaluator("zeroshot"), teacher, settings, tmp_path / "out")

    source = open_source(str(query))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    views = [evaluation_view(source.read(place), (56, 56)) for place in range(len(source.keys))]
    weights = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(NAME), source.classes, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    with torch.no_grad():
        images = model.encode_image((torch.stack(views) - mean) / std, normalize=True)
    logits = 100 * images @ weights
    right = (logits.argmax(1) == torch.from_numpy(source.labels)).float()
    assert report.metrics["top1"].value == pytest.approx(100 * float(right.mean()))
    lines = (tmp_path / "out" / f"zeroshot-openclip-{NAME}.jsonl").read_text().splitlines()
    for line, row in zip(lines, logits, strict=True):
        assert json.loads(line)["logits"] == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
