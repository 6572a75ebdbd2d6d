"""A ViT-S learns from other people's models, at two resolutions, and its checkpoint is scored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from evals.core.report import read
from radio import entry

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def _save_siglip(folder: Path) -> None:
    """SigLIP 2's base model as it is published, with random weights and a tokenizer of few words."""
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    text = {**sizes, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 224, "patch_size": 16}
    transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    ).save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "blue": 5, "circle": 6, "square": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.slow
def test_a_vit_s_learns_from_dinov3_and_siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_dinov3")
    safetensors.torch.save_file(network.state_dict(), "dinov3.safetensors")
    _save_siglip(tmp_path / "siglip2")
    Path("vit-s.yaml").write_text(
        """\
recipe: vit-s
student: vit-s16
teachers:
- name: dino_v3
  model: timm:vit_small_patch16_dinov3@dinov3.safetensors
  resolution: 64
  student_resolution: 96
- name: siglip2
  model: hf:siglip2
  resolution: 64
resolution: 64
steps: 20
batch_size: 4
out: runs/vit-s
data: {scenes: 100, workers: 0}
log_every: 10
"""
    )
    assert entry.train(["vit-s.yaml"]) == 0
    records = [json.loads(line) for line in Path("runs/vit-s/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 20 and math.isfinite(records[-1]["loss"])
    assert {"dino_v3/spatial", "siglip2/summary"} <= records[-1].keys()
    shared = ["runs/vit-s/ckpt.pt", "--scenes", "60", "--out", "reports", "--plain"]
    knn = ["knn", shared[0], "--scenes", "60", "60", *shared[3:], "--head", "dino_v3", "--k", "5"]
    assert entry.evaluate(knn) == 0
    assert entry.evaluate(["zeroshot", *shared]) == 0
    tasks = {report.task: report for report in map(read, Path("reports").glob("*.json"))}
    assert tasks["zeroshot"].settings["resolved"]["text"] == "hf:siglip2"
    assert 0 <= tasks["knn"].metrics["top1"].value <= 100
