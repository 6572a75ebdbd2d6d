"""Hugging Face folders as teachers, against transformers' own forward on images normalised by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from radio.benchmark import count
from radio.errors import CheckpointError, SizeError
from radio.hub import load_backbone, load_teacher
from radio.teachers.hf_trunks import KINDS
from radio.types import Teacher

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
TEXTS = ["a photo of a red cat", "two blue rings", "A PHOTO of unknown words and more than fit into it " * 3]
LENGTH = 12

pytestmark = pytest.mark.usefixtures("offline")


def save_letter_tokenizer(folder: Path) -> Any:
    """Write SigLIP 2's own tokenizer, of which transformers makes every folder of this type read one."""
    vocabulary = {
        token: index for index, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"))
    }
    for letter in sorted(set("".join(TEXTS).lower()) - {" "}):
        vocabulary[letter] = len(vocabulary)
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right")
    tokenizer.save_pretrained(folder)
    return tokenizer


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes them."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def flat(states: Tensor) -> Tensor:
    return states.flatten(1, 2) if states.ndim == 4 else states


def expected(kind: str, network: Any, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Compute (summary, tokens) after every block by transformers' own forward, the last from its outputs."""
    kind = kind.partition("-")[0]
    pixels = images if kind == "radio" else normalise(images)
    with torch.no_grad():
        if kind in ("clip", "siglip", "vit", "clip_vision_model", "siglip_vision_model"):
            return expected_resized(kind, network, pixels)
        if kind.startswith("siglip2"):
            return expected_patches(network, pixels)
        if kind.startswith("sam"):
            return expected_sam(kind, network, pixels)
        if kind == "radio":
            out = network(pixels, output_hidden_states=True)
            last = (out.summary, out.features)
            inner = [(x[:, [0, 1]].flatten(1), x[:, 10:]) for x in out.hidden_states[1:-1]]
            return [*inner, last]
        network = getattr(network, "dinov2", network)
        out = network(pixels, output_hidden_states=True)
        prefix = 1 + getattr(network.config, "num_register_tokens", 0)
        last = (out.pooler_output, out.last_hidden_state[:, prefix:])
        if kind == "dinov3_convnext":
            return [last]
        norm = network.norm if kind == "dinov3_vit" else network.layernorm
        return [*((norm(x)[:, 0], norm(x)[:, prefix:]) for x in out.hidden_states[1:-1]), last]


def expected_resized(kind: str, network: Any, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    options = {"interpolate_pos_encoding": True, "output_hidden_states": True}
    if kind == "vit":
        vit = getattr(network, "vit", network)
        out = vit(pixels, **options)
        states = [vit.layernorm(x) for x in out.hidden_states[1:-1]] + [out.last_hidden_state]
        return [(x[:, 0], x[:, 1:]) for x in states]
    vision = getattr(network, "vision_model", network)
    states = [vision.post_layernorm(x) for x in vision(pixels, **options).hidden_states[1:]]
    if kind.startswith("siglip"):
        last = vision(pixels, **options)
        assert torch.equal(last.last_hidden_state, states[-1])
        if kind == "siglip":
            last = network.get_image_features(pixels, **options)
        return [*((vision.head(x), x) for x in states[:-1]), (last.pooler_output, states[-1])]
    project = getattr(network, "visual_projection", nn.Identity())
    last = network.get_image_features(pixels, **options) if kind == "clip" else network(pixels, **options)
    summary = last.image_embeds if "image_embeds" in last else last.pooler_output
    return [*((project(x[:, 0]), x[:, 1:]) for x in states[:-1]), (summary, states[-1][:, 1:])]


def expected_patches(network: Any, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """NaFlex: patches as transformers' own image processor cuts them, all of them attended to."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    vision = getattr(network, "vision_model", network)
    patches = torch.stack([convert_image_to_patches(image, 14) for image in pixels])
    grid = torch.tensor([[side // 14 for side in pixels.shape[2:]]] * len(pixels))
    out = vision(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32),
        spatial_shapes=grid,
        output_hidden_states=True,
    )
    states = [vision.post_layernorm(x) for x in out.hidden_states[1:]]
    assert torch.equal(out.last_hidden_state, states[-1])
    return [*((vision.head(x), x) for x in states[:-1]), (out.pooler_output, states[-1])]


def expected_sam(kind: str, network: Any, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    encoder = (network.detector_model if kind == "sam3_video" else network).vision_encoder
    out = encoder(pixels, output_hidden_states=True)
    if kind.startswith("sam2"):
        states = [flat(out.last_hidden_state)]
    else:
        states = [flat(x) for x in out.hidden_states[1:]]
    return [(x.mean(1), x) for x in states]


FIXED = ("sam", "sam2", "sam2_video", "sam3", "sam3_video")
VARIANTS = ("dinov2-classifier", "dinov2-swiglu", "vit-classifier", "clip_vision_model-projected")


def test_every_kind_is_tested():
    assert {*KINDS} <= {"radio", *PARAMETERS}


PARAMETERS = [*KINDS, *VARIANTS]


@pytest.mark.parametrize("kind", PARAMETERS)
def test_features_are_transformers_own(kind, save_folder):
    folder, network = save_folder(kind)
    teacher = load_backbone(f"hf:{folder}")
    assert isinstance(teacher, Teacher) and teacher.name == "hf:tiny" and teacher.weights_file is None
    patch = {"sam": 16, "sam2": 32, "sam2_video": 32, "dinov3_convnext": 32}.get(kind, 14)
    side = 64 if patch > 14 else 56
    assert (teacher.native_size, teacher.patch_size, teacher.fixed_size) == (
        (side, side),
        patch,
        kind in FIXED,
    )
    sizes = [(side, side)] if kind in FIXED else [(side, side), (2 * patch, 5 * patch)]
    for height, width in sizes:
        images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))
        states = expected(kind, network, images)
        features = teacher(images)
        assert features.grid == (height // patch, width // patch)
        torch.testing.assert_close(features.summary, states[-1][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(features.tokens, states[-1][1], atol=1e-5, rtol=0)
        if teacher.intermediate is None:
            assert teacher.num_blocks == 0 and len(states) == 1
            continue
        assert teacher.num_blocks == len(states) == 3
        for block, inner in zip((2, 0), teacher.intermediate(images, [2, 0]), strict=True):
            torch.testing.assert_close(inner.summary, states[block][0], atol=1e-5, rtol=0)
            torch.testing.assert_close(inner.tokens, states[block][1], atol=1e-5, rtol=0)
    if kind in FIXED:
        with pytest.raises(SizeError, match=f"nearest size that it can is {side}x{side}"):
            teacher(torch.rand(1, 3, 2 * side, side))


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip2", "dinov3_convnext", "sam", "radio"])
def test_bfloat16_and_the_batch_size_change_little(kind, save_folder):
    folder, _ = save_folder(kind)
    teacher = load_backbone(f"hf:{folder}")
    images = torch.rand(3, 3, *teacher.native_size, generator=torch.Generator().manual_seed(3))
    together = teacher(images)
    alone = teacher(images[1:2])
    torch.testing.assert_close(together.tokens[1:2], alone.tokens, atol=1e-5, rtol=0)
    half = teacher.to(torch.device("cpu"), torch.bfloat16)(images)
    assert half.tokens.dtype == half.summary.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(half.tokens.float(), together.tokens, dim=-1).min() > 0.98


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_texts_are_transformers_own(kind, save_folder, save_tokenizer):
    folder, network = save_folder(kind)
    tokenizer = save_letter_tokenizer(folder) if kind == "siglip2" else save_tokenizer(folder)
    teacher = load_backbone(f"hf:{folder}")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        theirs = network.get_text_features(ids["input_ids"]).pooler_output
        if kind == "clip":  # whose processor gives the mask too; the causal one makes it idle
            masked = network.get_text_features(ids["input_ids"], ids["attention_mask"]).pooler_output
            torch.testing.assert_close(theirs, masked)
    assert teacher.text is not None
    vectors = teacher.text.encode(TEXTS)
    torch.testing.assert_close(vectors, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher.text.encode(TEXTS[:1]), vectors[:1], atol=1e-5, rtol=0)
    summary = teacher(torch.rand(1, 3, 56, 56)).summary
    assert teacher.text.project(summary) is summary and summary.shape[1] == vectors.shape[1]


def test_siglips_own_sentencepiece_tokenizer(save_folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder, network = save_folder("siglip")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in TEXTS]),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    tokenizer.save_pretrained(folder)
    assert (folder / "spiece.model").exists()
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert ids["input_ids"].unique().numel() > 15
    with torch.no_grad():
        theirs = network.get_text_features(ids["input_ids"]).pooler_output
    text = load_backbone(f"hf:{folder}").text
    torch.testing.assert_close(text.encode(TEXTS), theirs, atol=1e-5, rtol=0)


def test_texts_are_lower_cased_for_siglip_alone(save_folder, save_tokenizer):
    for kind in ("siglip", "clip"):
        folder, _ = save_folder(kind, name=kind)
        save_tokenizer(folder, lower_case=False)
        small, large = load_backbone(f"hf:{folder}").text.encode(["a red cat", "A RED cat"])
        assert torch.equal(small, large) == (kind == "siglip")


def test_without_a_tokenizer_images_work_and_texts_say_what_is_missing(save_folder):
    folder, _ = save_folder("clip")
    teacher = load_backbone(f"hf:{folder}")
    assert teacher(torch.rand(1, 3, 56, 56)).summary.shape == (1, 24)
    with pytest.raises(
        CheckpointError, match=r"tiny: has no tokenizer, so it takes no texts; get tokenizer\.js"
    ):
        teacher.text.encode(TEXTS)


def test_another_models_tokenizer_and_a_broken_one(save_folder, save_tokenizer):
    folder, _ = save_folder("clip")
    save_tokenizer(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["red"] = 40
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match="has the id 40, and its text encoder takes padded ids below 40"
    ):
        load_backbone(f"hf:{folder}").text.encode(TEXTS)
    tokenizer = save_tokenizer(folder)
    tokenizer.add_tokens([f"extra{number}" for number in range(40)])
    tokenizer.save_pretrained(folder)
    text = load_backbone(f"hf:{folder}").text
    assert text.encode(["a cat"]).shape == (1, 24)
    with pytest.raises(
        CheckpointError, match=r"tokenizer gave the id \d+, and its text encoder takes padded ids"
    ):
        text.encode(["a cat", "an extra39"])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers reads"):
        load_backbone(f"hf:{folder}").text.encode(TEXTS)


def test_shards_half_precision_and_an_at_in_the_path(save_folder):
    folder, network = save_folder("dinov2", name="a@b", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        theirs = network(normalise(images)).pooler_output
    torch.testing.assert_close(load_backbone(f"hf:{folder}")(images).summary, theirs, atol=1e-5, rtol=0)
    for path in folder.glob("*.safetensors"):
        halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(halves, path)
    teacher = load_backbone(f"hf:{folder}")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(teacher(images).summary, theirs, atol=1e-2, rtol=1e-2)


def test_the_fingerprint_is_of_content_and_not_of_place(save_folder, save_tokenizer):
    folder, _ = save_folder("clip")
    save_tokenizer(folder)
    first = load_backbone(f"hf:{folder}")
    again = load_backbone(f"hf:{shutil.copytree(folder, folder.with_name('copy'))}")
    assert (again.fingerprint, again.text.fingerprint) == (first.fingerprint, first.text.fingerprint)
    edit(folder / "config.json", vision_config=first_vision(folder) | {"num_attention_heads": 4})
    assert load_backbone(f"hf:{folder}").fingerprint != first.fingerprint
    edit(folder / "tokenizer_config.json", padding_side="left")
    assert load_backbone(f"hf:{folder}").text.fingerprint != first.text.fingerprint


def first_vision(folder: Path) -> dict[str, Any]:
    vision: dict[str, Any] = json.loads((folder / "config.json").read_text())["vision_config"]
    return vision


@pytest.mark.parametrize("kind", KINDS)
def test_meta_needs_no_weights(kind, save_folder):
    folder, _ = save_folder(kind)
    real = load_teacher(f"hf:{folder}")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    planned = load_teacher(f"hf:{folder}", meta=True)
    assert all(parameter.is_meta for parameter in planned.parameters())
    for name in ("native_size", "patch_size", "fixed_size", "summary_dim", "token_dim", "num_blocks"):
        assert getattr(planned, name) == getattr(real, name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (planned, real)]
    assert shapes[0] == shapes[1]
    assert len({id(weight) for weight in planned.state_dict(keep_vars=True).values()}) == len(shapes[0])
    assert count(real, real.native_size).gmacs > 0
    with FakeTensorMode(allow_non_fake_inputs=True):  # as `radio-train --plan` runs it
        planned.to_empty(device="cpu")
        features = planned(torch.empty(2, 3, *planned.native_size))
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], planned.token_dim)


def test_nothing_is_printed(save_folder, capfd):
    folder, _ = save_folder("clip")
    capfd.readouterr()
    load_backbone(f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def run_on_scenes(task: str, folder: Path, out: Path, *more: str) -> dict[str, float]:
    """Run a command line on the generated world; return its report's scores."""
    from evals.cli import main

    limits = ("--limit", "32", "--device", "cpu", "--plain", *more)
    assert main([task, f"hf:{folder}", "--out", str(out), "--cache", str(out / "cache"), *limits]) == 0
    (report,) = out.glob(f"{task}-*.json")
    metrics = json.loads(report.read_text())["metrics"]
    return {name: metric["value"] for name, metric in metrics.items()}


def test_zero_shot_end_to_end(save_folder, tmp_path, capfd, save_tokenizer):
    folder, _ = save_folder("clip")
    save_tokenizer(folder)
    scores = run_on_scenes("zeroshot", folder, tmp_path / "out")
    assert 0 <= scores["top1"] <= scores["top5"] <= 100


def test_k_nn_end_to_end(save_folder, tmp_path, capfd):
    folder, _ = save_folder("dinov2")
    scores = run_on_scenes("knn", folder, tmp_path / "out", "--scenes", "60", "60", "--k", "5")
    assert 0 <= scores["top1"] <= 100


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_position_ids_of_older_files_are_no_weights(kind, save_folder):
    folder, _ = save_folder(kind)
    before = load_backbone(f"hf:{folder}").fingerprint
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert load_backbone(f"hf:{folder}").fingerprint == before


def test_vision_only_files_with_the_older_prefix(save_folder):
    folder, _ = save_folder("clip_vision_model")
    before = load_backbone(f"hf:{folder}").fingerprint
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    old = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(old, folder / "model.safetensors")
    assert load_backbone(f"hf:{folder}").fingerprint == before
