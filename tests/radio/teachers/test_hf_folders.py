"""Hugging Face folders that are incomplete, contradictory, damaged or hostile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from radio.errors import CheckpointError, ConfigError, MissingExtraError
from radio.hub import load_backbone, load_teacher

transformers = pytest.importorskip("transformers")

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
TEXTS = ["a photo of a red cat"]
LENGTH = 12

pytestmark = pytest.mark.usefixtures("offline")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes them."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "native"),
    [
        ({"size": 56, "crop_size": None}, 56),
        ({"size": {"shortest_edge": 70}, "crop_size": None}, 70),
        ({"size": 70, "crop_size": 42}, 42),
        ({"size": {"height": 42, "width": 42}, "do_center_crop": False}, 42),
        ({"crop_size": {"shortest_edge": 28}}, 28),
    ],
)
def test_the_native_size_is_the_preprocessors(changes, native, save_folder):
    folder, _ = save_folder("dinov2")
    edit(folder / "preprocessor_config.json", **changes)
    assert load_teacher(f"hf:{folder}", meta=True).native_size == (native, native)


def test_a_preprocessor_inside_processor_config(save_folder):
    folder, _ = save_folder("clip")
    path = folder / "preprocessor_config.json"
    inner = json.loads(path.read_text())
    path.unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    teacher = load_teacher(f"hf:{folder}")
    torch.testing.assert_close(teacher.get_buffer("mean").flatten(), torch.tensor(MEAN))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        load_teacher(f"hf:{folder}")


def test_a_radio_may_be_normalised_by_nothing(save_folder):
    folder, _ = save_folder("radio")
    edit(folder / "preprocessor_config.json", do_normalize=True, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    load_teacher(f"hf:{folder}", meta=True)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("clip", {"image_mean": None}, "has no image_mean or no image_std"),
        (
            "clip",
            {"image_mean": [0.5, 0.5]},
            r"preprocessor_config\.json: image_mean: list should have at least 3",
        ),
        ("clip", {"image_std": [0.5, 0, 0.5]}, r"image_std\[1\]: input should be greater than 0, got 0"),
        (
            "clip",
            {"crop_size": 70},
            "makes images of 70x70 pixels, and config.json describes a network for 56x56",
        ),
        ("dinov2", {"crop_size": 60}, "60x60 pixels, which do not divide into patches of 14"),
        ("dinov2", {"size": None, "crop_size": None}, "names no size"),
        ("dinov2", {"size": "large", "crop_size": None}, r"preprocessor_config\.json: size"),
        ("dinov2", {"rescale_factor": 1.0}, r"does not scale pixels to \[0, 1\]"),
        ("dinov2", {"rescale_factor": 0}, r"does not scale pixels to \[0, 1\]"),
        ("dinov2", {"do_rescale": False}, r"does not scale pixels to \[0, 1\]"),
        ("radio", {"do_normalize": True, "image_mean": MEAN, "image_std": STD}, "and so does the network"),
    ],
)
def test_preprocessors_that_are_incomplete_or_contradict(kind, changes, message, save_folder):
    folder, _ = save_folder(kind)
    edit(folder / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_teacher(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def test_folders_that_are_none_or_lack_a_file(save_folder, tmp_path):
    with pytest.raises(CheckpointError, match="absent: no such folder; wanted hf:FOLDER"):
        load_backbone(f"hf:{tmp_path / 'absent'}")
    folder, _ = save_folder("dinov2")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such folder"):
        load_backbone(f"hf:{folder / 'model.safetensors'}")
    (folder / "preprocessor_config.json").rename(folder / "other.json")
    with pytest.raises(
        CheckpointError, match=r"no preprocessor_config\.json, so mean, std and size are unknown"
    ):
        load_backbone(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no config\.json; wanted the folder of one Hugging Face model"
    ):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, r"config\.json: is not JSON"),
        ("[]", CheckpointError, r"config\.json: input should be a valid dictionary"),
        (
            '{"architectures": ["RADIOModel"], "version": "c-radio_v3-h"}',
            ConfigError,
            "; take radio:/.*tiny$",
        ),
        ("{}", ConfigError, r"its model_type None cannot be a teacher; known: dinov2, "),
        (
            '{"model_type": "bert"}',
            ConfigError,
            "its model_type 'bert' cannot be a teacher.*known: .*, radio$",
        ),
        ('{"model_type": "dinov2", "hidden_size": "wide"}', CheckpointError, "describes no network"),
        ('{"model_type": "dinov2", "hidden_act": "wave"}', CheckpointError, "describes no network"),
        (
            '{"model_type": "dinov2", "hidden_size": 1099511627776}',
            CheckpointError,
            "hidden_size is 1099511627776; no model has more than 1048576",
        ),
        ('{"model_type": "vit", "num_hidden_layers": 9999}', CheckpointError, "no model has more than 1024"),
        ('{"model_type": "dinov2", "hidden_size": 98304}', CheckpointError, "do not belong together"),
        ('{"model_type": "dinov2", "num_attention_heads": -2}', CheckpointError, "is -2; wanted at least 1"),
        (f'{{"model_type": {"[" * 900}{"]" * 900}}}', CheckpointError, r"config\.json: is nested too deeply"),
        ('{"model_type": "dinov2", "quantization_config": {}}', CheckpointError, "has a quantization_config"),
    ],
)
def test_bad_configurations(text, error, message, save_folder):
    folder, _ = save_folder("dinov2")
    (folder / "config.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_backbone(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def change_weights(
    folder: Path, *, drop: str = "", add: str = "", reshape: str = "", to_int8: str = "", to_int64: str = ""
) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    if add:
        tensors[add] = torch.zeros(3)
    if reshape:
        tensors[reshape] = torch.zeros(5)
    if to_int8:
        tensors[to_int8] = tensors[to_int8].to(torch.int8)
    if to_int64:
        tensors[to_int64] = tensors[to_int64].to(torch.int64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "dinov2",
            {"to_int8": "layernorm.weight"},
            r"of another kind: layernorm\.weight int8 instead of a fl",
        ),
        (
            "dinov2",
            {"to_int64": "layernorm.weight"},
            r"of another kind: layernorm\.weight int64 instead of a fl",
        ),
        (
            "dinov2",
            {"drop": "layernorm.weight"},
            r"tiny: these are not the weights .*missing: layernorm\.weight$",
        ),
        ("dinov2", {"add": "extra.weight"}, r"unexpected: extra\.weight$"),
        (
            "dinov2",
            {"reshape": "layernorm.weight"},
            r"misshapen: layernorm\.weight \(5,\) instead of \(32,\)$",
        ),
        ("clip", {"drop": "visual_projection.weight"}, r"missing: visual_projection\.weight$"),
        ("clip", {"add": "vision_model.extra"}, r"unexpected: vision_model\.extra$"),
        ("clip_vision_model", {"drop": "post_layernorm.bias"}, r"missing: post_layernorm\.bias$"),
        ("vit", {"drop": "encoder.layer.1.output.dense.bias"}, r"missing: layers\.1\.mlp\.fc2\.bias$"),
        (
            "radio",
            {"drop": "radio_model.model.blocks.2.norm1.bias"},
            r"missing: encoder\.layer\.2\.norm1\.bias$",
        ),
        ("sam", {"drop": "vision_encoder.pos_embed"}, r"missing: vision_encoder\.pos_embed$"),
    ],
)
def test_weights_are_loaded_strictly(kind, changes, message, save_folder):
    folder, _ = save_folder(kind)
    change_weights(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(f"hf:{folder}")


def test_broken_and_absent_weights(save_folder):
    folder, _ = save_folder("dinov2", max_shard_size="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-\d+\.safetensors: not a whole safetensors file"
    ):
        load_backbone(f"hf:{folder}")
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors: no such weights file"):
        load_backbone(f"hf:{folder}")
    index = folder / "model.safetensors.index.json"
    edit(index, weight_map={"a": "../a.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"names \.\./a\.safetensors; wanted safetensors in the same folder"
    ):
        load_backbone(f"hf:{folder}")
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: input should be a valid dictionary"):
        load_backbone(f"hf:{folder}")
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin, which could run code when read; .*save_pretrained"
    ):
        load_backbone(f"hf:{folder}")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; wanted model\.safetensors"):
        load_backbone(f"hf:{folder}")


def test_infinite_weights_are_refused(save_folder):
    folder, network = save_folder("dinov2")
    network.layernorm.weight.data[0] = torch.inf
    network.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="tensors hold NaN or infinities"):
        load_backbone(f"hf:{folder}")


def test_doubles_that_no_float_holds_are_refused(save_folder):
    folder, _ = save_folder("dinov2")
    file = folder / "model.safetensors"
    large = torch.full((32,), 1e300, dtype=torch.double)
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {"layernorm.weight": large}, file)
    with pytest.raises(CheckpointError, match=r"hold NaN or infinities, the first is layernorm\.weight"):
        load_backbone(f"hf:{folder}")


def test_code_in_the_folder_is_not_run(save_folder, save_tokenizer):
    folder, network = save_folder("clip")
    tokenizer = save_tokenizer(folder)
    trace = folder / "it-ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    auto_map = dict.fromkeys(names, "evil.Evil")
    edit(folder / "config.json", auto_map=auto_map)
    edit(folder / "preprocessor_config.json", auto_map=auto_map)
    vectors = load_backbone(f"hf:{folder}").text.encode(TEXTS[:1])
    with torch.no_grad():
        ids = tokenizer(TEXTS[:1], padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
        theirs = network.get_text_features(ids).pooler_output
    torch.testing.assert_close(vectors, theirs, atol=1e-5, rtol=0)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    torch.testing.assert_close(load_backbone(f"hf:{folder}").text.encode(TEXTS[:1]), vectors)
    assert not trace.exists()


def test_a_siglip_without_its_head_has_no_summary(save_folder):
    folder, _ = save_folder("siglip_vision_model")
    edit(folder / "config.json", vision_use_head=False)
    change_weights(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    safetensors.torch.save_file(kept, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tiny: its vision_use_head is false: without a pooling head"):
        load_backbone(f"hf:{folder}")


def test_without_transformers_the_extra_is_named(save_folder, monkeypatch):
    folder, _ = save_folder("dinov2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'get it with: pip install "am-radio\[hf\]"'):
        load_backbone(f"hf:{folder}")
