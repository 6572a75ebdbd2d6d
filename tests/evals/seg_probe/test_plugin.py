from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evals.seg_probe import evaluator
from evals.seg_probe.classes import KNOWN_CLASSES
from evals.seg_probe.protocol import SegSettings, resolve
from radio.dist import Ranks
from radio.errors import MissingExtraError


def test_class_names_are_mmsegmentations_own(plugin: Any) -> None:
    from mmseg import datasets

    theirs = {
        "ADE20K": datasets.ADE20KDataset,
        "VOC2012": datasets.PascalVOCDataset,
        "Pascal Context": datasets.PascalContextDataset,
        "COCO-Stuff": datasets.COCOStuffDataset,
    }
    assert theirs.keys() == KNOWN_CLASSES.keys()
    for name, data_set in theirs.items():
        assert KNOWN_CLASSES[name] == tuple(each.strip() for each in data_set.METAINFO["classes"])


def test_our_parts_are_in_the_registries(plugin: Any) -> None:
    from mmseg.registry import MODELS, TRANSFORMS

    for name in ("RadioBackbone", "KeptTokens", "LinearHead"):
        assert MODELS.get(name).__name__ == name
    assert TRANSFORMS.get("FitResize") is plugin.FitResize


def test_batch_norm_is_torchs(plugin: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = plugin.SharedBatchNorm(5, Ranks()), nn.BatchNorm2d(5)
    for module in (ours, theirs):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 2, 5))
            module.bias.copy_(torch.linspace(-1, 1, 5))
    for _ in range(3):
        maps = torch.randn(4, 5, 3, 2) * torch.arange(1, 6).view(1, 5, 1, 1) + 7
        one, other = ours(maps), theirs(maps)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        one.square().sum().backward()
        other.square().sum().backward()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-3, rtol=1e-3)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(maps), theirs(maps), atol=1e-4, rtol=1e-4)


class _Mirror(Ranks):
    """Two ranks that hold the same."""

    def sum(self, array):
        return 2 * array


def head_and_batch(plugin: Any, group: Ranks):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(1)
    head = plugin.LinearHead(6, 4, group)
    labels = torch.randint(0, 4, (2, 1, 10, 14))
    labels[0, :, :5] = 255
    samples = []
    for label in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    return head, torch.randn(2, 6, 5, 7), labels, samples


@pytest.mark.parametrize("group", [Ranks(), _Mirror(0, 2)], ids=["alone", "two ranks"])
def test_the_loss_is_the_mean_over_labelled_pixels(plugin: Any, group: Ranks) -> None:
    head, maps, labels, samples = head_and_batch(plugin, group)
    loss = head.loss((maps,), samples, {})
    logits = F.interpolate(head((maps,)), size=(10, 14), mode="bilinear", align_corners=False)
    wanted = F.cross_entropy(logits, labels.squeeze(1), ignore_index=255)
    torch.testing.assert_close(loss["loss_ce"], wanted)
    assert list(loss) == ["loss_ce"]


def test_a_batch_of_void_has_no_loss_rather_than_nan(plugin: Any) -> None:
    head, maps, _, samples = head_and_batch(plugin, Ranks())
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    assert head.loss((maps,), samples, {})["loss_ce"].item() == 0


def test_the_backbone_is_frozen_unseen_and_not_in_the_checkpoint(plugin: Any, backbone: Callable) -> None:
    model = nn.Sequential(nn.Dropout())
    model.eval()
    holder = plugin.RadioBackbone(model, torch.float32)
    holder.train()
    assert not model.training
    assert list(holder.parameters()) == []
    plan, _ = resolve(replace(SegSettings(data=Path("x")), crop=56), backbone())
    segmentor = plugin.build_model(backbone(), torch.float32, plan, 3, Ranks(), cached=False)
    names = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv_seg.weight", "conv_seg.bias"]
    assert sorted(segmentor.state_dict()) == sorted(f"decode_head.{name}" for name in names)
    assert segmentor.decode_head.conv_seg.weight.shape == (3, 6, 1, 1)


def test_images_arrive_as_padded_rgb_between_0_and_1(plugin: Any, backbone: Callable) -> None:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    plan, _ = resolve(replace(SegSettings(data=Path("x")), crop=28), backbone())
    segmentor = plugin.build_model(backbone(), torch.float32, plan, 3, Ranks(), cached=False)
    bgr = torch.tensor([255, 51, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 28)
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=torch.ones(1, 20, 28, dtype=torch.int64))
    data = segmentor.data_preprocessor({"inputs": [bgr], "data_samples": [sample]}, training=True)
    (image,), (sample,) = data["inputs"], data["data_samples"]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([0, 0.2, 1.0]))  # red, green, blue
    assert image.shape == (3, 28, 28)
    assert not image[:, 20:].any()
    assert sample.gt_sem_seg.data[0, :, 0].tolist() == [1] * 20 + [255] * 8


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("libGL.so.1: cannot open shared object file", "install libgl1: apt-get install libgl1"),
        ("libgthread-2.0.so.0: cannot open shared object file", "install libglib2.0-0"),
    ],
)
def test_a_system_library_that_opencv_lacks_is_named(monkeypatch, missing: str, said: str) -> None:
    def fail(module: str, *, extra: str) -> None:
        raise ImportError(missing)

    monkeypatch.setattr(evaluator, "require", fail)
    with pytest.raises(MissingExtraError, match=said):
        evaluator.load_plugin()


def test_without_mmsegmentation_the_error_names_the_extra(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mmseg", None)
    with pytest.raises(MissingExtraError, match=r"mmseg is not installed.*am-radio\[seg\]"):
        evaluator.load_plugin()


def test_importing_is_silent(capfd, plugin: Any) -> None:
    import subprocess
    import sys

    code = "from evals.seg_probe.evaluator import load_plugin; load_plugin()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_whole_images_are_resized_to_what_the_backbone_takes(plugin: Any, backbone: Callable) -> None:
    resized = plugin.FitResize(backbone(), 2048, 56).transform({"img": np.zeros((50, 90, 3), np.uint8)})
    assert resized["img_shape"] == resized["img"].shape[:2] == (56, 98)
