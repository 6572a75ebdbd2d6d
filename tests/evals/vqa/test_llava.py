"""The bridge: features pass the tower as the backbone gives them, and a saved LLaVA says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from evals.vqa.language import LanguageModel
from evals.vqa.llava import PROJECTOR, choose_grid, learn, make_llava, resample, restore, save_llava
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.hub import load_backbone
from radio.model import ModelConfig, build
from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics
from radio.nn.token_merging import merge_tokens
from radio.types import Backbone


def make(
    model: Backbone, tiny: LanguageModel, num_tokens: int, size: int = 32, layer_norm: bool = False
) -> Any:
    return make_llava(model, tiny, (size, size), num_tokens, layer_norm=layer_norm, seed=0)


def say(model: Any, tiny: LanguageModel, images: torch.Tensor, num_tokens: int) -> list[list[int]]:
    ids = torch.tensor([[1, *[tiny.image_token] * num_tokens, 6, 7]]).repeat(len(images), 1)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=tiny.pad_token,
        )
    said: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return said


@pytest.mark.parametrize("layer_norm", [False, True])
def test_tokens_and_images_give_the_same(
    backbone: Callable[..., Any], tiny: LanguageModel, layer_norm: bool
) -> None:
    encoder = backbone()
    tower = make(encoder, tiny, 16, layer_norm=layer_norm).model.vision_tower
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = encoder(images).tokens
    seen = tower(images).hidden_states[-1]
    assert torch.equal(seen, tower(tokens).hidden_states[-1])
    if layer_norm:
        mean, spread = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
        assert torch.allclose(seen, (tokens - mean) / (spread + 1e-6).sqrt(), atol=1e-5)
    else:
        assert torch.equal(seen, tokens)


def test_the_projector_is_two_layers_drawn_from_the_seed(
    backbone: Callable[..., Any], tiny: LanguageModel
) -> None:
    model = make(backbone(), tiny, 16)
    projector = model.model.multi_modal_projector
    x = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    hidden = x @ projector.linear_1.weight.T + projector.linear_1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert torch.allclose(
        projector(x), hidden @ projector.linear_2.weight.T + projector.linear_2.bias, atol=1e-5
    )
    assert torch.equal(
        projector.linear_1.weight, make(backbone(), tiny, 16).model.multi_modal_projector.linear_1.weight
    )
    other = make_llava(backbone(), tiny, (32, 32), 16, layer_norm=False, seed=1)
    assert not torch.equal(projector.linear_1.weight, other.model.multi_modal_projector.linear_1.weight)


def test_only_the_named_parts_learn_and_none_of_the_encoder(
    backbone: Callable[..., Any], tiny: LanguageModel
) -> None:
    model = make(backbone(), tiny, 16)
    assert not list(model.model.vision_tower.parameters())
    learn(model, (PROJECTOR,))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{PROJECTOR}linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}


def test_weights_of_another_model_are_refused(backbone: Callable[..., Any], tiny: LanguageModel) -> None:
    model = make(backbone(), tiny, 16)
    restore(model, {f"{PROJECTOR}linear_2.bias": torch.ones(32)}, "here")
    assert (model.model.multi_modal_projector.linear_2.bias == 1).all()
    with pytest.raises(CheckpointError, match=r"here: model\.other is none of this model's weights"):
        restore(model, {"model.other": torch.ones(1)}, "here")


def test_a_saved_llava_opens_in_transformers_and_says_the_same(tiny: LanguageModel, tmp_path: Path) -> None:
    """The encoder goes along: the folder is moved, and opened without the backbone."""
    student = build(ModelConfig(student="vit-tiny12"), 3).eval()
    side = student.native_size[0]
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        num_tokens = student(images).tokens.shape[1]
    model = make(student, tiny, num_tokens, side, layer_norm=True)
    before = say(model, tiny, images, num_tokens)
    assert len({tuple(row) for row in before}) > 1  # it does look
    save_llava(model, tiny, tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "moved", local_files_only=True).eval()
    assert say(again, tiny, images, num_tokens) == before
    tower = again.model.vision_tower
    assert tower.backbone is not student and tower.backbone.fingerprint == student.fingerprint
    assert again.config.image_seq_length == num_tokens
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moved", local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == tiny.image_token
    with pytest.raises(ConfigError, match="is there already; remove it, or choose another folder"):
        save_llava(model, tiny, tmp_path / "moved")


def test_a_teacher_is_kept_by_its_name(tiny: LanguageModel, tmp_path: Path) -> None:
    teacher = load_backbone("scenes:clip")
    side = teacher.native_size[0]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    num_tokens = teacher(images).tokens.shape[1]
    model = make(teacher, tiny, num_tokens, side)
    before = say(model, tiny, images, num_tokens)
    save_llava(model, tiny, tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    assert again.model.vision_tower.config.encoder == "scenes:clip"
    assert say(again, tiny, images, num_tokens) == before
    again.model.vision_tower._backbone = []
    again.model.vision_tower.config.fingerprint = "0" * 64
    with pytest.raises(CheckpointError, match=r"scenes:clip: has the fingerprint .* instead of 000000000000"):
        _ = again.model.vision_tower.backbone


def test_a_backbone_without_a_spec_cannot_be_saved(
    backbone: Callable[..., Any], tiny: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="pooled cannot be opened by its name alone"):
        save_llava(make(backbone(), tiny, 16), tiny, tmp_path / "saved")
    assert not list(tmp_path.glob("*saved*"))


def test_a_coarser_grid_goes_along_with_the_folder(tiny: LanguageModel, tmp_path: Path) -> None:
    student = build(ModelConfig(student="vit-tiny12"), 3).eval()
    side = student.native_size[0]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, (height, width) = student(images).tokens, student(images).grid
    model = make_llava(student, tiny, (side, side), 4, layer_norm=False, seed=0, token_grid=(2, 2))
    seen = model.model.vision_tower(images).last_hidden_state
    assert height == width and height % 2 == 0
    half = height // 2
    first = tokens.unflatten(1, (height, width))[:, :half, :half].mean((1, 2))
    assert torch.allclose(seen[:, 0], first, atol=1e-6) and seen.shape[1] == 4
    before = say(model, tiny, images, 4)
    save_llava(model, tiny, tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    assert say(again, tiny, images, 4) == before


def test_merged_tokens_go_along_with_the_folder(tiny: LanguageModel, tmp_path: Path) -> None:
    student = build(ModelConfig(student="vit-tiny12"), 3).eval()
    side = student.native_size[0]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = student(images)
    model = make_llava(student, tiny, (side, side), 5, layer_norm=False, seed=0, merged_tokens=5)
    seen = model.model.vision_tower(images).last_hidden_state
    assert torch.equal(seen, merge_tokens(features.tokens, features.grid, 5)) and seen.shape[1] == 5
    before = say(model, tiny, images, 5)
    save_llava(model, tiny, tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    assert say(again, tiny, images, 5) == before


def test_an_encoder_of_nan_is_asked_nothing(backbone: Callable[..., Any], tiny: LanguageModel) -> None:
    encoder = backbone()
    tower = make(encoder, tiny, 16).model.vision_tower
    with pytest.raises(RadioError, match="pooled gives values that are not finite; nothing can be asked"):
        tower(torch.full((1, 3, 32, 32), float("nan")))


def test_a_full_disk_leaves_no_half_of_a_folder(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_backbone("scenes:clip")
    model = make(teacher, tiny, 4, teacher.native_size[0])

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(RadioError, match=r"saved: the model could not be written \(I/O error: No space left"):
        save_llava(model, tiny, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grid", "most", "chosen"),
    [
        ((64, 64), 1024, (32, 32)),  # SAM's
        ((64, 64), 576, (24, 24)),
        ((64, 64), 1000, (31, 31)),
        ((64, 64), 1, (1, 1)),
        ((24, 24), 576, (24, 24)),
        ((24, 24), None, (24, 24)),
        ((20, 40), 200, (10, 20)),
        ((1, 1000), 10, (1, 10)),
        ((1000, 1), 10, (10, 1)),
    ],
)
def test_the_largest_grid_that_fits(grid: tuple[int, int], most: int | None, chosen: tuple[int, int]) -> None:
    assert choose_grid(grid, most) == chosen


def test_each_token_is_the_mean_of_those_it_stands_for() -> None:
    tokens = torch.rand(2, 6 * 4, 3, generator=torch.Generator().manual_seed(0))
    coarse = resample(tokens, (6, 4), (3, 2))
    for row in range(3):
        for column in range(2):
            places = [y * 4 + x for y in (2 * row, 2 * row + 1) for x in (2 * column, 2 * column + 1)]
            mean = sum(tokens[:, place] for place in places) / 4
            assert torch.allclose(coarse[:, row * 2 + column], mean, atol=1e-6)
    assert resample(tokens, (6, 4), (6, 4)) is tokens


def test_normalised_tokens_go_along_with_the_folder(tiny: LanguageModel, tmp_path: Path) -> None:
    student = build(ModelConfig(student="vit-tiny12"), 3).eval()
    side = student.native_size[0]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = student(images).tokens
    statistics = FeatureStatistics(student.token_dim)
    statistics.update(tokens.flatten(0, 1))
    normaliser = FeatureNormaliser.fit(statistics)
    options = {"layer_norm": False, "seed": 0, "normaliser": normaliser}
    model = make_llava(student, tiny, (side, side), tokens.shape[1], **options)
    seen = model.model.vision_tower(images).last_hidden_state
    torch.testing.assert_close(seen, (tokens - normaliser.mean) @ normaliser.tx.T)
    assert torch.equal(seen, model.model.vision_tower(tokens).last_hidden_state)
    before = say(model, tiny, images, tokens.shape[1])
    assert before != say(make(student, tiny, tokens.shape[1], side), tiny, images, tokens.shape[1])
    save_llava(model, tiny, tmp_path / "saved")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    assert say(again, tiny, images, tokens.shape[1]) == before
