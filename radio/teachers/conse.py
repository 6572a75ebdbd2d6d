"""ConSE (M. Norouzi et al. 2014): zero-shot from an ordinary classifier and a sentence encoder.

An image's vector is the mean of the text vectors of its T likeliest ImageNet classes, weighted by their
probabilities, so that it can be compared with the text vector of any name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import digest, load_state, load_tensors
from ..errors import DataError, require

# Letters: B batch, C summary width, K classes of the classifier, N texts, E text width.

LIKELIEST = 10  # T of the paper's best model on ImageNet, ConSE(10)
_TEXTS_AT_ONCE = 256
_LONGEST = 256  # tokens, as in the encoder's fine-tuning


@final
class SentenceEncoder(nn.Module):
    """A BERT whose mean token vector represents a sentence, read from a folder of a Hugging Face model.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the weights are not those of the folder's `config.json`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        library = require("transformers", extra="weights")
        config = library.BertConfig.from_json_file(str(folder / "config.json"))
        self.bert: Any = library.BertModel(config, add_pooling_layer=False)
        tensors = {
            name: tensor
            for name, tensor in load_tensors(folder / "model.safetensors").items()
            if not name.startswith("pooler.") and name != "embeddings.position_ids"
        }
        load_state(self.bert, tensors, str(folder))
        self.tokenizer: Any = require("tokenizers", extra="weights").Tokenizer.from_file(
            str(folder / "tokenizer.json")
        )
        self.tokenizer.enable_truncation(_LONGEST)
        self.tokenizer.enable_padding()
        self.requires_grad_(False)
        self.eval()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as mean token vectors [N, E], not normalised.

        Raises:
            DataError: no texts.
        """
        if not texts:
            raise DataError("no texts to encode; give at least one")
        batches = [list(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE)]
        with torch.no_grad():
            return torch.cat([self._encode(batch) for batch in batches])

    def _encode(self, texts: list[str]) -> Tensor:
        lines = self.tokenizer.encode_batch(texts)
        device = self.bert.device
        ids = torch.tensor([line.ids for line in lines], device=device)
        mask = torch.tensor([line.attention_mask for line in lines], device=device)
        vectors: Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).to(vectors.dtype)
        return (vectors * kept).sum(1) / kept.sum(1)


@final
class ConseText:
    """The text tower of a classifier; the sentence encoder is read from disk at the first text or image.

    Args:
        classifier: Linear, from the summary [B, C] to the logits of K classes.
        names: the K classes in words, in the order of the logits.
        folder: returns the folder of the sentence encoder; called at first use.
        identity: represents the encoder's files in the fingerprint.
        likeliest: T, the number of classes in an image's vector.
    """

    def __init__(
        self,
        classifier: nn.Linear,
        names: Sequence[str],
        folder: Any,
        *,
        identity: str,
        likeliest: int = LIKELIEST,
    ) -> None:
        assert classifier.out_features == len(names), "every class has a name"
        self.classifier = classifier.requires_grad_(False)
        self._names, self._folder = tuple(names), folder
        self._identity = f"{identity} ConSE({likeliest})"
        self._likeliest = likeliest

    @property
    def fingerprint(self) -> str:
        """Hex hash of the encoder's identity, the classifier's weights and its class names."""
        return digest(self.classifier.state_dict(), f"{self._identity} {self._names}")

    @cached_property
    def encoder(self) -> SentenceEncoder:
        """Sentence encoder, read at first use.

        Raises:
            MissingWeightsError: its package is not installed.
        """
        return SentenceEncoder(self._folder())

    @cached_property
    def _named(self) -> Tensor:
        """Unit vectors [K, E] of the classifier's classes."""
        return F.normalize(self.encode(self._names), dim=1)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as vectors [N, E], not normalised, on the classifier's device."""
        return self.encoder.to(self.classifier.weight.device).encode(texts)

    def project(self, summaries: Tensor) -> Tensor:
        """Project summaries [B, C] to [B, E]: the mean vector of the T likeliest classes by probability."""
        device = summaries.device  # cached summaries are on the CPU, the classifier may not be
        weight, bias = self.classifier.weight.to(device), self.classifier.bias.to(device)
        with torch.no_grad():
            likely = F.linear(summaries, weight, bias).softmax(1).topk(self._likeliest, dim=1)
        weights = likely.values / likely.values.sum(1, keepdim=True)
        return torch.einsum("bt,bte->be", weights, self._named.to(device)[likely.indices])
