"""The published protocols, and the input sizes that they give a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.seg_probe.protocol import (
    PRESETS,
    SegSettings,
    check_sizes,
    choose_attention,
    keep_ratio,
    resolve,
    shown_sizes,
)
from radio.errors import ConfigError, SizeError
from radio.model import ModelConfig, build
from radio.students import ERadioOptions

DATA = SegSettings(data=Path("somewhere"))


def test_the_paper_is_the_default_for_data_and_the_scenes_without(backbone: Callable) -> None:
    plan, notes = resolve(DATA, backbone())
    assert (plan.preset, plan.crop, plan.stride) == ("paper", (518, 518), (518, 518))
    assert (plan.iterations, plan.train_batch_size, plan.lr, plan.warmup) == (160_000, 16, 1e-3, 1500)
    assert (plan.long_side, plan.short_side, plan.slides) == (2048, 518, True)
    assert notes == ()
    assert resolve(SegSettings(), backbone())[0].preset == "scenes"


@pytest.mark.parametrize(
    ("preset", "stride", "iterations", "weight_decay"),
    [("released", None, 80_000, 0.0), ("dinov2", (345, 345), 40_000, 1e-4)],
)
def test_the_other_protocols(preset, stride, iterations, weight_decay, backbone: Callable) -> None:
    plan, _ = resolve(replace(DATA, preset=preset), backbone())
    assert (plan.stride, plan.iterations, plan.weight_decay) == (stride, iterations, weight_decay)


def test_dinov2s_own_numbers_stand_where_the_backbone_takes_them(backbone: Callable) -> None:
    plan, notes = resolve(replace(DATA, preset="dinov2"), backbone(16))
    assert (plan.crop, plan.stride, plan.short_side, notes) == ((512, 512), (341, 341), 512, ())


@pytest.mark.parametrize(
    ("patch", "only", "crop"),
    [
        (16, None, 224),  # §5.5: "or 224x224 for others"
        (32, None, 224),
        (7, None, 518),
        (128, None, 512),  # takes neither: the nearest to 518
        (16, (256, 256), 256),
    ],
)
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_papers_crop_is_518_then_224_then_the_nearest(
    preset, patch, only, crop, backbone: Callable
) -> None:
    plan, notes = resolve(replace(DATA, preset=preset), backbone(patch, only=only))
    assert plan.crop == (crop, crop)
    told = f"the preset {preset} crops 518 px; patches{patch} takes {crop}x{crop}, which was used"
    assert notes == (() if crop == 518 else (told,))
    assert resolve(replace(DATA, preset="dinov2"), backbone(14))[0].crop == (518, 518)  # nearest to 512


def test_a_student_whose_windows_do_not_divide_518_px_gets_global_attention() -> None:
    with torch.device("meta"):  # the student of paper-h14: 37 x 37 tokens, windows of 8
        model = build(ModelConfig(student="vitdet-h14"), 0)
    probed, notes = choose_attention(DATA, model)
    assert probed.window is None and model.window == 8
    assert resolve(DATA, probed)[0].crop == (518, 518)
    (note,) = notes
    assert note == (
        "the preset paper crops 518 px, which windows of 8 tokens do not divide, so vitdet-h14 was used with "
        "global attention; --crop 560 keeps the windows"
    )
    for settings, other in (
        (replace(DATA, crop=560), model),  # a crop that was asked for
        (DATA, model.with_window(37)),
        (DATA, probed),
        (DATA, build(ModelConfig(student="e-radio-tiny", options=ERadioOptions(window=4)), 0)),
    ):
        assert choose_attention(settings, other) == (other, ())


def test_a_crop_that_was_asked_for_must_fit(backbone: Callable) -> None:
    assert resolve(replace(DATA, crop=252), backbone())[0].crop == (252, 252)
    with pytest.raises(SizeError, match=r"does not take crops of 250x250 px.* use --crop 252"):
        resolve(replace(DATA, crop=250), backbone())
    with pytest.raises(SizeError, match=r"the nearest that it takes is 96x224$"):
        resolve(replace(DATA, crop=224), backbone(16, only=(96, 224)))


def test_what_is_asked_for_replaces_the_preset(backbone: Callable) -> None:
    asked = replace(DATA, iterations=320, train_batch_size=4, lr=1e-4, weight_decay=0.0, stride=259)
    plan, _ = resolve(asked, backbone())
    assert (plan.iterations, plan.train_batch_size, plan.lr, plan.weight_decay) == (320, 4, 1e-4, 0.0)
    assert plan.stride == (259, 259)
    assert plan.warmup == 3  # the same share as 1500 of 160000
    assert resolve(replace(DATA, iterations=2), backbone())[0].warmup == 1
    assert resolve(replace(DATA, iterations=1), backbone())[0].warmup == 0


def test_strides_that_make_no_sense(backbone: Callable) -> None:
    with pytest.raises(SizeError, match="leaves pixels between crops of 518x518 unseen; give 518 or less"):
        resolve(replace(DATA, stride=519), backbone())
    with pytest.raises(SizeError, match="this preset looks at whole images"):
        resolve(SegSettings(stride=4), backbone())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_does(name, backbone: Callable) -> None:
    said = resolve(replace(DATA, preset=name), backbone())[0].describe()
    assert said["preset"] == name
    assert all(word in said["schedule"] for word in ("iterations", "warm-up"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop": 0}, "^crop: 0 is out of bounds; give a number of at least 1 and of at most 16384"),
        ({"stride": 10**9}, "^stride: 1000000000 is out of bounds"),
        ({"iterations": 10**26}, "^iterations: 1"),
        ({"train_batch_size": 10**9}, "^train_batch_size: 1000000000 is out of bounds"),
        ({"seeds": 0}, "^seeds: 0 is out"),
        ({"head_seed": -1}, "^head_seed: -1 is out"),
        ({"save_maps": -1}, "^save_maps: -1 is out"),
        ({"save_every": 0}, "^save_every: 0 is out"),
        ({"lr": 0.0}, "^lr: 0.0 is out of bounds; give a number above 0"),
        ({"lr": float("nan")}, "^lr: nan "),
        ({"lr": float("inf")}, "^lr: inf "),
        ({"weight_decay": -0.1}, "^weight_decay: -0.1 is out"),
        ({"token_cache_gb": float("nan")}, "^token_cache_gb: nan "),
        ({"scenes": (10, 0)}, r"^scenes\[1\]: 0 is out"),
        ({"scenes": (10**9, 1)}, r"^scenes\[0\]: 1000000000 is out"),
    ],
)
def test_settings_that_no_data_could_make_sense_of(changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        SegSettings(**changes)


def test_keep_ratio_is_mmcvs(plugin) -> None:
    from mmcv import rescale_size

    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 3000, (500, 2)).tolist():
        wanted = rescale_size((width, height), (2048, 518))
        assert keep_ratio((height, width), 2048, 518) == (wanted[1], wanted[0])


def test_a_long_image_is_padded_up_to_the_crop(backbone: Callable) -> None:
    plan, _ = resolve(DATA, backbone())
    assert keep_ratio((100, 1000), 2048, 518) == (205, 2048)
    assert shown_sizes([(100, 1000), (683, 518), (3, 3)], plan, backbone()) == {(518, 518)}
    check_sizes([(100, 1000), (683, 518), (3, 3)], plan, backbone())


def test_whole_images_are_fitted(backbone: Callable) -> None:
    plan, _ = resolve(replace(DATA, preset="released"), backbone())
    assert shown_sizes([(512, 683)], plan, backbone()) == {(518, 518), (518, 686)}
    plan, _ = resolve(SegSettings(), backbone())
    assert shown_sizes([(512, 683)], plan, backbone()) == {(98, 98)}


def test_a_backbone_that_contradicts_itself_is_found_out(backbone: Callable) -> None:
    plan, _ = resolve(replace(DATA, crop=504), backbone())
    with pytest.raises(SizeError, match=r"504x504 px, which it does not take.*512x512.*--crop 512"):
        check_sizes([(600, 600)], plan, backbone(16))


def test_slide_over_683_by_518_shows_the_backbone_accepted_sizes_only(plugin, backbone: Callable) -> None:
    from radio.dist import Ranks

    model = backbone()
    plan, _ = resolve(DATA, model)
    segmentor = plugin.build_model(model, torch.float32, plan, 3, Ranks(), cached=False).eval()
    for height, width, count in ((518, 683, 2), (683, 518, 2), (205, 2048, 4)):
        model.sizes.clear()
        data = segmentor.data_preprocessor(
            {"inputs": [torch.zeros(3, height, width, dtype=torch.uint8)], "data_samples": [_Sample()]}
        )
        meta = [{"img_shape": (height, width), "ori_shape": (height, width)}]
        with torch.no_grad():
            logits = segmentor.slide_inference(data["inputs"], meta)
        assert model.sizes == [plan.crop] * count
        assert logits.shape == (1, 3, max(height, 518), max(width, 518))


class _Sample:
    """Takes what padding says of it."""

    def set_metainfo(self, values: dict) -> None:
        self.values = values
