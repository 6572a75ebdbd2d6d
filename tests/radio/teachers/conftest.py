"""Random weights that leave no part without effect, Hugging Face folders, a file that would run code."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def randomised() -> Callable[[nn.Module], Any]:
    """A function that redraws every weight: layer scales and norms about 1, not 1e-5 or exactly 1."""

    def redraw(module: nn.Module) -> nn.Module:
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                is_gain = name.endswith(("gamma", "lambda1")) or (
                    tensor.ndim == 1 and name.endswith("weight")
                )
                tensor.normal_(1.0 if is_gain else 0.0, 0.2 if is_gain else 0.05, generator=generator)
        return module.eval()

    return redraw


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[Path, Path]:
    """A weights file that makes another file when it is unpickled carelessly, and that other file."""
    trace = tmp_path / "it-ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    path = tmp_path / "bomb.pth"
    path.write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
    return path, trace


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first attempt to reach a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


_MEAN, _STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
_LENGTH = 12  # of texts
_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_TEXT = _VIT | {"vocab_size": 40, "max_position_embeddings": _LENGTH, "pad_token_id": 0, "eos_token_id": 1}
_SIZE = {"size": {"height": 56, "width": 56}}
_SAM_VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 48}
_SAM2_HIERA = {
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}


def _whole(t: Any, name: str, vision: dict[str, Any]) -> nn.Module:
    """Build a whole CLIP, SigLIP or SigLIP 2."""
    config = getattr(t, f"{name}Config")
    more = {"projection_dim": 24} if name == "CLIP" else {}
    return getattr(t, f"{name}Model")(config(text_config=_TEXT, vision_config=_VIT | vision, **more))


def _vision_part(t: Any, name: str, vision: dict[str, Any]) -> nn.Module:
    config = getattr(t, f"{name.removesuffix('WithProjection')}Config".replace("Model", ""))
    return getattr(t, name)(config(**_VIT, **vision))


def _make(t: Any, kind: str) -> nn.Module:
    """Build a tiny network of transformers."""
    fixed = {"image_size": 56, "patch_size": 14}
    makers = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**_VIT, **fixed)),
        "dinov2-classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**_VIT, **fixed)),
        "dinov2-swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**_VIT, **fixed, use_swiglu_ffn=True)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**_VIT, **fixed, num_register_tokens=3)
        ),
        "dinov3_vit": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**_VIT, **fixed, num_register_tokens=2)),
        "dinov3_convnext": lambda: t.DINOv3ConvNextModel(
            t.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(**_VIT, **fixed)),
        "vit-classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**_VIT, **fixed)),
        "clip": lambda: _whole(t, "CLIP", fixed),
        "clip_vision_model": lambda: _vision_part(t, "CLIPVisionModel", fixed),
        "clip_vision_model-projected": lambda: _vision_part(
            t, "CLIPVisionModelWithProjection", fixed | {"projection_dim": 20}
        ),
        "siglip": lambda: _whole(t, "Siglip", fixed),
        "siglip_vision_model": lambda: _vision_part(t, "SiglipVisionModel", fixed),
        "siglip2": lambda: _whole(t, "Siglip2", {"num_patches": 16, "patch_size": 14}),
        "siglip2_vision_model": lambda: _vision_part(
            t, "Siglip2VisionModel", {"num_patches": 16, "patch_size": 14}
        ),
        "radio": lambda: t.RadioModel(t.RadioConfig(**_VIT, max_img_size=64, patch_size=14)),
        "sam": lambda: t.SamModel(
            t.SamConfig(
                vision_config=_SAM_VISION
                | {"image_size": 64, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16},
                prompt_encoder_config={"image_size": 64, "hidden_size": 16, "image_embedding_size": 4},
                mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2},
            )
        ),
        "sam2": lambda: _make_sam2(t, "Sam2"),
        "sam2_video": lambda: _make_sam2(t, "Sam2Video"),
        "sam3": lambda: _make_sam3(t),
        "sam3_video": lambda: _make_sam3_video(t),
    }
    return makers[kind]()


def _sam2_config(t: Any, name: str) -> Any:
    neck = {"fpn_hidden_size": 16, "backbone_channel_list": [128, 64, 32, 16], "num_feature_levels": 3}
    vision = t.Sam2VisionConfig(
        backbone_config=t.Sam2HieraDetConfig(**_SAM2_HIERA),
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        **neck,
    )
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return getattr(t, f"{name}Config")(
        vision_config=vision,
        prompt_encoder_config={"image_size": 64, "hidden_size": 16, "patch_size": 16},
        mask_decoder_config=decoder,
    )


def _make_sam2(t: Any, name: str) -> nn.Module:
    return getattr(t, f"{name}Model")(_sam2_config(t, name))


def _sam3_config(t: Any) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_layers": 1}
    backbone = _VIT | {"image_size": 56, "pretrain_image_size": 28, "patch_size": 14, "window_size": 2}
    return t.Sam3Config(
        vision_config={
            "backbone_config": backbone | {"model_type": "sam3_vit_model", "global_attn_indexes": [1]},
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=_TEXT | {"projection_dim": 16},
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small,
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )


def _make_sam3(t: Any) -> nn.Module:
    return t.Sam3Model(_sam3_config(t))


def _make_sam3_video(t: Any) -> nn.Module:
    return t.Sam3VideoModel(t.Sam3VideoConfig(detector_config=_sam3_config(t)))


def _preprocessor(kind: str) -> dict[str, Any]:
    plain = {"do_resize": True, "do_normalize": True, "image_mean": _MEAN, "image_std": _STD} | _SIZE
    if kind.startswith(("dinov2", "clip")):
        return plain | {
            "size": {"shortest_edge": 60},
            "do_center_crop": True,
            "crop_size": _SIZE["size"],
            "rescale_factor": 1 / 255,
        }
    if kind.startswith("siglip2"):
        return {key: value for key, value in plain.items() if key != "size"} | {"max_num_patches": 16}
    if kind == "radio":
        return {"do_normalize": False, "size": {"shortest_edge": 56}}
    if kind == "sam":
        return plain | {"size": {"longest_edge": 64}, "do_pad": True, "pad_size": {"height": 64, "width": 64}}
    if kind.startswith(("sam2", "dinov3_convnext")):
        return plain | {"size": 64}
    return plain


@pytest.fixture
def save_folder(tmp_path: Path, randomised: Callable[[nn.Module], Any]) -> Callable[..., tuple[Path, Any]]:
    """A function that writes a kind's folder as transformers does; it returns the folder and the network."""
    t = pytest.importorskip("transformers")

    def write(kind: str, name: str = "tiny", **options: Any) -> tuple[Path, Any]:
        folder = tmp_path / name
        network = randomised(_make(t, kind))
        network.save_pretrained(folder, **options)
        (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(kind)))
        return folder, network

    return write


@pytest.fixture
def save_tokenizer() -> Callable[..., Any]:
    """A function that writes a tokenizer of words, with an end and a padding token, as transformers does."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")

    def write(folder: Path, *, lower_case: bool = True) -> Any:
        words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        for word in ["a", "photo", "of", "a", "red", "cat", "two", "blue", "rings"]:
            words.setdefault(word, len(words))
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        if lower_case:
            backend.normalizer = tokenizers.normalizers.Lowercase()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(folder)
        return tokenizer

    return write
