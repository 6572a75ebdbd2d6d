"""timm models with weights from a file."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch

from radio.errors import CheckpointError, ConfigError
from radio.hub import load_backbone, load_teacher
from radio.types import Teacher


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_file_give_timms_own_features(ending, tmp_path):
    torch.manual_seed(3)
    network = timm.create_model("test_resnet").eval()  # with its classifier, as published weights have it
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    teacher = load_teacher(f"timm:test_resnet@{path}")
    assert isinstance(teacher, Teacher) and teacher.text is None
    assert (teacher.name, teacher.native_size, teacher.nearest_size(100, 70)) == (
        "timm:test_resnet",
        (160, 160),
        (96, 64),
    )
    images = torch.rand(2, 3, 96, 64)
    found = teacher(images)
    with torch.no_grad():
        last = network.forward_features((images - 0.5) / 0.5)
        torch.testing.assert_close(found.map(), last)
        torch.testing.assert_close(found.summary, network.forward_head(last, pre_logits=True))
    assert load_backbone(f"timm:test_resnet@{path}").fingerprint == teacher.fingerprint


def test_weights_without_a_classifier_and_of_another_number_of_classes(tmp_path):
    for classes in (0, 7):
        path = tmp_path / f"{classes}.pth"
        network = timm.create_model("test_convnext", num_classes=classes).eval()
        torch.save(network.state_dict(), path)
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            wanted = network.forward_features((images - 0.5) / 0.5)
        torch.testing.assert_close(load_teacher(f"timm:test_convnext@{path}")(images).map(), wanted)


def test_a_model_of_one_size_keeps_it(tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit_relpos").state_dict(), path)
    assert load_teacher(f"timm:test_vit_relpos@{path}").nearest_size(96, 96) == (160, 160)


def test_other_weights_none_and_unsafe_ones_are_errors(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    named = r"timm:test_vit: missing: cls_token, pos_embed, .* and 75 more; unexpected: conv1\.0\.weight, "
    with pytest.raises(CheckpointError, match=named) as caught:
        load_teacher(f"timm:test_vit@{path}")
    assert "\n" not in str(caught.value)
    part = timm.create_model("test_vit").state_dict()
    del part["blocks.1.mlp.fc1.weight"]
    torch.save(part, path)
    with pytest.raises(CheckpointError, match=r"timm:test_vit: missing: blocks\.1\.mlp\.fc1\.weight;"):
        load_teacher(f"timm:test_vit@{path}")
    whole = timm.create_model("test_vit").state_dict()
    for weight, message in (
        (torch.zeros(2, 3), r"misshapen: blocks\.1\.mlp\.fc1\.weight \(2, 3\) instead of \(192, 64\)"),
        (torch.zeros(192, 64, dtype=torch.int8), r"not floating-point: blocks\.1\.mlp\.fc1\.weight"),
        (torch.full((192, 64), torch.nan), r"hold NaN or infinities, the first is blocks\.1\.mlp\.fc1"),
        (torch.full((192, 64), 1e300, dtype=torch.double), r"hold NaN or infinities, the first is blocks\.1"),
    ):
        torch.save(whole | {"blocks.1.mlp.fc1.weight": weight}, path)
        with pytest.raises(CheckpointError, match=message):
            load_teacher(f"timm:test_vit@{path}")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a torch file, or a truncated one"):
        load_teacher(f"timm:test_vit@{path}")
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such weights file"):
        load_teacher("timm:test_vit@gone.pth")
    with pytest.raises(CheckpointError, match=r"timm:test_vit needs a weights file, timm:test_vit@FILE"):
        load_teacher("timm:test_vit")
    with pytest.raises(ConfigError, match=r"timm has no weights 'test_vit\.it'; known: test_vit, "):
        load_teacher(f"timm:test_vit.it@{path}")
    with pytest.raises(ConfigError, match="no model 'test_vti'; did you mean"):
        load_teacher("timm:test_vti@w.pth")
    torch.save({"run": print}, path)
    with pytest.raises(CheckpointError, match="reading it could run code"):
        load_teacher(f"timm:test_vit@{path}")


def test_without_a_file_it_is_an_architecture():
    assert load_backbone("timm:test_vit", random_init=True).name == "timm:test_vit"
    assert load_backbone("arch:timm:test_vit").native_size == (160, 160)
    with pytest.raises(ConfigError, match="timm:test_vit is an architecture and has no weights"):
        load_backbone("timm:test_vit")


@pytest.mark.parametrize("options", [{"meta": True}, {}])
def test_a_model_that_pools_nothing_has_no_summary(options, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match="timm:qwen3_vit_88m_enc pools no vector"):
        load_teacher(f"timm:qwen3_vit_88m_enc@{path}", **options)
