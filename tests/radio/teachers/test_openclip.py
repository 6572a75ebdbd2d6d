"""open_clip models as teachers against open_clip's own encode_image and encode_text."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from radio.errors import CheckpointError, ConfigError, DataError, SizeError
from radio.teachers import families
from radio.teachers.openclip import (
    OPENAI_MEAN,
    OPENAI_STD,
    ClipTrunk,
    _read_normalisation,
    _text_tower,
    build_clip,
    openclip,
)
from radio.types import Teacher

open_clip = pytest.importorskip("open_clip")

TEXTS = ["a photo of a cat", "two small blue rings on a red field", "naïve café"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The name of a small architecture, entered in open_clip's list, and beside it its -quickgelu twin."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 56, "layers": 3, "width": 128, "patch_size": 14},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    for name, more in (("radio-tiny", {}), ("radio-tiny-quickgelu", {"quick_gelu": True})):
        path = tmp_path_factory.mktemp("configs") / f"{name}.json"
        path.write_text(json.dumps(config | more))
        open_clip.add_model_config(path)
    return "radio-tiny"


def library_model(name: str, randomised):
    return randomised(open_clip.CLIP(**open_clip.get_model_config(name)))


def save(model, path, **more):
    torch.save({"epoch": 3, "name": "run", "state_dict": model.state_dict(), **more}, path)
    return path


def check_against_library(name: str, model, teacher: Teacher, side: int) -> None:
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    features = teacher(images)
    with torch.no_grad():
        theirs = model.encode_image((images - mean) / std)
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    torch.testing.assert_close(features.summary, theirs, atol=1e-5, rtol=0)
    assert teacher.text is not None
    torch.testing.assert_close(teacher.text.encode(TEXTS), texts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
def test_summary_and_text_are_the_librarys(tiny, suffix, randomised, tmp_path):
    model = library_model(tiny + suffix, randomised)
    teacher = families["openclip"](tiny + suffix, save(model, tmp_path / "w.pt"))
    assert isinstance(teacher, Teacher)
    assert (teacher.native_size, teacher.summary_dim, teacher.token_dim) == ((56, 56), 24, 128)
    check_against_library(tiny + suffix, model, teacher, 56)


@pytest.mark.slow
def test_vit_b_32_is_the_librarys(randomised, tmp_path):
    model = library_model("ViT-B-32", randomised)
    teacher = families["openclip"]("ViT-B-32", save(model, tmp_path / "w.pt"))
    check_against_library("ViT-B-32", model, teacher, 224)


def test_gelu_is_decided_by_the_architectures_name(tiny, randomised, tmp_path):
    path = save(library_model(tiny, randomised), tmp_path / "w.pt")
    images = torch.rand(1, 3, 56, 56)
    plain, quick = (families["openclip"](name, path)(images).summary for name in (tiny, f"{tiny}-quickgelu"))
    assert (plain - quick).abs().max() > 1e-3


@pytest.mark.parametrize("after_norm", [True, False])
def test_tokens_are_the_last_layers_patches(tiny, after_norm, randomised, tmp_path):
    model = library_model(tiny, randomised)
    teacher = openclip(tiny, save(model, tmp_path / "w.pt"), after_norm=after_norm)
    images = torch.rand(2, 3, 56, 56)
    visual, caught = model.visual, []
    visual.transformer.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        model.encode_image((images - teacher.get_buffer("mean")) / teacher.get_buffer("std"))
        last = visual.ln_post(caught[0]) if after_norm else caught[0]
    features = teacher(images)
    assert features.grid == (4, 4)
    torch.testing.assert_close(features.tokens, last[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("after_norm", [True, False])
def test_features_after_a_block_are_those_of_the_model_cut_there(tiny, after_norm, randomised, tmp_path):
    model = library_model(tiny, randomised)
    teacher = openclip(tiny, save(model, tmp_path / "w.pt"), after_norm=after_norm)
    assert teacher.num_blocks == 3 and teacher.intermediate is not None
    images = torch.rand(2, 3, 56, 56)
    for block, features in zip([2, 0, 1], teacher.intermediate(images, [2, 0, 1]), strict=True):
        cut = copy.deepcopy(model.visual)
        cut.transformer.resblocks = cut.transformer.resblocks[: block + 1]
        whole = ClipTrunk(cut, cut.grid_size, after_norm=after_norm)
        with torch.no_grad():
            normalised = (images - teacher.get_buffer("mean")) / teacher.get_buffer("std")
            torch.testing.assert_close(features.summary, cut(normalised), atol=1e-5, rtol=0)
            torch.testing.assert_close(features.tokens, whole(normalised).tokens, atol=1e-5, rtol=0)


def test_the_fingerprint_covers_the_choice_of_tokens(tiny, randomised, tmp_path):
    path = save(library_model(tiny, randomised), tmp_path / "w.pt")
    after, before = (openclip(tiny, path, after_norm=choice) for choice in (True, False))
    assert after.fingerprint != before.fingerprint
    assert after.text.fingerprint == before.text.fingerprint


def test_data_parallel_prefixes_and_a_one_element_logit_scale_load(tiny, randomised, tmp_path):
    model = library_model(tiny, randomised)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    check_against_library(tiny, model, families["openclip"](tiny, tmp_path / "w.pt"), 56)


@pytest.mark.filterwarnings("ignore")
def test_openais_archives_are_read_and_want_their_own_gelu(tiny, randomised, tmp_path):
    """As OpenAI publishes them: TorchScript, with three sizes beside the weights."""

    class Held(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    quick = f"{tiny}-quickgelu"
    state, root = library_model(quick, randomised).state_dict(), Held()
    sizes = {"input_resolution": 56, "context_length": 8, "vocab_size": 9}
    for key, value in {**state, **{name: torch.tensor(size) for name, size in sizes.items()}}.items():
        *path, last = key.split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, Held())
            at = at.get_submodule(part)
        at.register_buffer(last, value.clone())
    torch.jit.script(root).save(str(tmp_path / "archive.pt"))
    torch.save(state, tmp_path / "state.pt")
    archive, plain = (families["openclip"](quick, tmp_path / f"{name}.pt") for name in ("archive", "state"))
    assert archive.fingerprint == plain.fingerprint and archive.text.fingerprint == plain.text.fingerprint
    with pytest.raises(CheckpointError, match=rf"trained with QuickGELU; name them openclip:{quick}@"):
        families["openclip"](tiny, tmp_path / "archive.pt")


def test_texts_are_batched_without_changing_them(tiny, randomised, tmp_path, monkeypatch):
    teacher = families["openclip"](tiny, save(library_model(tiny, randomised), tmp_path / "w.pt"))
    whole = teacher.text.encode(TEXTS)
    monkeypatch.setattr("radio.teachers.base._TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(teacher.text.encode(TEXTS), whole)
    with pytest.raises(DataError, match="no texts"):
        teacher.text.encode([])


def test_the_text_tower_moves_along_and_stays_frozen(tiny, randomised, tmp_path):
    teacher = families["openclip"](tiny, save(library_model(tiny, randomised), tmp_path / "w.pt"))
    teacher.to(torch.device("cpu"), torch.bfloat16)
    vectors = teacher.text.encode(TEXTS)
    assert vectors.dtype == torch.bfloat16 and not vectors.requires_grad


def test_another_size_is_refused(tiny, randomised, tmp_path):
    teacher = families["openclip"](tiny, save(library_model(tiny, randomised), tmp_path / "w.pt"))
    with pytest.raises(SizeError, match="nearest size that it can is 56x56"):
        teacher(torch.rand(1, 3, 70, 70))


@pytest.mark.parametrize(
    "name", ["ViT-L-14", "ViT-H-14-quickgelu", "ViT-H-14-378", "ViT-g-14", "ViT-bigG-14-CLIPA"]
)
def test_large_members_names_and_shapes(name):
    config = open_clip.get_model_config(name)
    ours = build_clip(open_clip, config)
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(name))
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert ours.attn_mask is None or not ours.attn_mask.is_meta
    if name == "ViT-H-14-quickgelu":
        assert sum(p.numel() for p in ours.visual.parameters()) == pytest.approx(632e6, rel=0.01)


def test_partial_foreign_and_missing_files(tiny, randomised, tmp_path):
    state = library_model(tiny, randomised).state_dict()
    torch.save(
        {key: value for key, value in state.items() if "resblocks.1" not in key}, tmp_path / "partial.pt"
    )
    with pytest.raises(
        CheckpointError, match=r"openclip:radio-tiny@.*missing: .*resblocks\.1.* and \d+ more"
    ):
        families["openclip"](tiny, tmp_path / "partial.pt")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"missing: .*unexpected: conv1\.weight"):
        families["openclip"](tiny, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="openclip:ViT-B-32@FILE"):
        families["openclip"]("ViT-B-32", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33", "unknown open_clip architecture 'ViT-B-33'; did you mean ViT-B-32"),
        ("RN50", "RN50 cannot be a teacher: its image tower is a ResNet; .*ViT-H-14"),
        ("EVA02-B-16", "its image tower is timm's eva02_base_patch16_clip_224; .*ViT-B-16-SigLIP"),
        ("PE-Core-B-16", "its image tower is timm's vit_pe_core_base_patch16_224"),
        ("nllb-clip-base-siglip", "cannot be a teacher: its"),
        ("coca_ViT-B-32", r"pools by attention \(CoCa\)"),
        ("roberta-ViT-B-32", "its text tower is roberta-base of transformers"),
        ("ViT-L-14/laion2b", "knows no weights 'laion2b' of ViT-L-14; did you mean .*laion2b_s32b_b82k"),
        ("ViT-H-14/dfn5b", "not trained with the GELU of ViT-H-14; name it ViT-H-14-quickgelu/dfn5b"),
        ("ViT-B-32-quickgelu/laion2b_e16", "knows no weights 'laion2b_e16' of ViT-B-32-quickgelu"),
    ],
)
def test_what_cannot_be_a_teacher(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        families["openclip"](name, tmp_path / "absent.pt")


def test_a_tag_brings_its_own_normalisation():
    half = (0.5, 0.5, 0.5)
    assert _read_normalisation(open_clip, "ViT-L-14", "laion2b_s32b_b82k", False) == (half, half)
    assert _read_normalisation(open_clip, "ViT-L-14", "", False) == (OPENAI_MEAN, OPENAI_STD)
    assert _read_normalisation(open_clip, "ViT-H-14-CLIPA", "", False)[0] == (0.485, 0.456, 0.406)


def test_a_tokenizer_that_open_clip_does_not_carry_is_named(tmp_path):
    config = open_clip.get_model_config("ViT-L-14-CLIPA")
    model = build_clip(open_clip, config)
    tower = _text_tower(open_clip, "ViT-L-14-CLIPA", config, model, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"bert-base-uncased, which open_clip does not .* has no tok"):
        tower.encode(["a cat"])


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    """The name of a small SigLIP, entered in open_clip's list, with one of timm's image towers."""
    config = {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit3",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 40,
            "width": 96,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "hf_tokenizer_name": "radio/tiny-siglip",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    }
    path = tmp_path_factory.mktemp("configs") / "radio-siglip.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return "radio-siglip"


@pytest.mark.parametrize("after_norm", [True, False])
def test_siglip_is_the_librarys(siglip, after_norm, randomised, tmp_path):
    config = open_clip.get_model_config(siglip)
    del config["custom_text"]
    model = randomised(open_clip.CustomTextCLIP(**config))
    path = save(model, tmp_path / "w.pt")
    save_words(tmp_path)
    teacher = openclip(siglip, path, after_norm=after_norm)
    assert isinstance(teacher, Teacher)
    assert (teacher.native_size, teacher.patch_size, teacher.fixed_size) == ((160, 160), 16, True)
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    features = teacher(images)
    normalised = (images - teacher.get_buffer("mean")) / teacher.get_buffer("std")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), 12, clean="canonicalize")
    last = []
    model.visual.trunk.blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        theirs, texts = model.encode_image(normalised), model.encode_text(tokenizer(TEXTS))
        tokens = (model.visual.trunk.norm(last[0]) if after_norm else last[0])[:, 1:]  # without the register
    torch.testing.assert_close(features.summary, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(teacher.text.encode(TEXTS), texts, atol=1e-5, rtol=0)
    shouted = teacher.text.encode([text.upper() + "!" for text in TEXTS])
    torch.testing.assert_close(shouted[:2], texts[:2], atol=1e-5, rtol=0)


def save_words(folder: Path) -> None:
    """Write the files of a tokenizer of words, as transformers does."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ("<pad>", "<unk>", "a", "photo", "of", "cat", "two", "small", "blue")
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def test_a_siglip_without_its_tokenizer_and_with_another_ones(siglip, randomised, tmp_path):
    config = open_clip.get_model_config(siglip)
    del config["custom_text"]
    path = save(randomised(open_clip.CustomTextCLIP(**config)), tmp_path / "w.pt")
    teacher = families["openclip"](siglip, path)
    before = teacher.text.fingerprint
    assert teacher(torch.rand(1, 3, 160, 160)).grid == (10, 10)
    with pytest.raises(
        CheckpointError, match="radio/tiny-siglip, which open_clip does not carry; put the tok"
    ):
        teacher.text.encode(TEXTS)
    save_words(tmp_path)
    assert families["openclip"](siglip, path).text.fingerprint != before
    edited = (tmp_path / "tokenizer.json").read_text().replace('"cat": 5', '"cat": 50')
    (tmp_path / "tokenizer.json").write_text(edited)
    with pytest.raises(
        CheckpointError, match="has the id 50, and its text encoder takes padded ids below 40"
    ):
        families["openclip"](siglip, path).text.encode(TEXTS)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384", "ViT-B-32-SigLIP2-256"])
def test_released_siglips_names_and_shapes(name):
    config = open_clip.get_model_config(name)
    del config["custom_text"]
    with torch.device("meta"):
        theirs = open_clip.CustomTextCLIP(**config)
    teacher = families["openclip"](name, None, meta=True)
    visual = {f"visual.{key}": value.shape for key, value in theirs.visual.state_dict().items()}
    assert {key: value.shape for key, value in teacher.trunk.state_dict().items()} == visual
    height, width = teacher.trunk.grid
    assert (height * width, teacher.token_dim) == tuple(theirs.visual.trunk.pos_embed.shape[1:])
    assert teacher.get_buffer("mean").is_meta and teacher.summary_dim == config["embed_dim"]
