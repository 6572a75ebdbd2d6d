"""timm students: maps of every layout, sizes, options, and the paper's ten by parameter count."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from radio.errors import ConfigError, SizeError
from radio.students import TABLE_6, students
from radio.students.timm import TimmOptions, TimmStudent, make_network

SMALL = ("test_resnet", "test_convnext", "test_mambaout", "test_vit", "test_maxvit", "test_efficientnet")
PAPER_MILLIONS = (21, 44, 30, 38, 88, 254, 49, 119, 56, 51)


def images(side: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def student(name: str, **options: object) -> TimmStudent:
    torch.manual_seed(0)
    made = students[f"timm:{name}"](TimmOptions(**options))  # type: ignore[arg-type]
    assert isinstance(made, TimmStudent)
    return made


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_features_are_timms_own(name):
    made = student(name).eval()
    network, cfg = made.trunk.network, made.trunk.network.pretrained_cfg
    assert made.native_size == (160, 160)
    found = made(images(160))
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    normalised = (images(160) - mean) / std
    torch.testing.assert_close(
        found.summary, network(normalised)
    )  # without classes timm's forward gives this
    maps = network.forward_intermediates(normalised, indices=1, norm=True, intermediates_only=True)[-1]
    if maps.shape[1] == made.token_dim:  # all but EfficientNet, whose last convolution comes after the stages
        torch.testing.assert_close(found.map(), maps)
    assert found.summary.shape == (2, made.summary_dim)
    assert found.tokens.shape == (2, found.grid[0] * found.grid[1], made.token_dim)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_maxvit"])
def test_the_neck_adds_the_last_map_to_the_one_before_at_twice_the_resolution(name):
    made = student(name, upsample=True).eval()
    found = made(images(160))
    assert found.grid == (10, 10)
    plain, neck = student(name).eval(), made.trunk.neck
    plain.trunk.network.load_state_dict(made.trunk.network.state_dict())
    torch.testing.assert_close(found.summary, plain(images(160)).summary)
    assert neck is not None
    nn.init.zeros_(neck.lateral.weight)
    last = plain(images(160)).map()
    repeated = (
        torch.einsum("bchw,cdij->bdhiwj", last, neck.up.weight).flatten(2, 3).flatten(3)
    )  # stride = kernel
    bias = (neck.up.bias + neck.lateral.bias).view(-1, 1, 1)
    torch.testing.assert_close(made(images(160)).map(), repeated + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "upsample"), [(name, None) for name in SMALL] + [("test_resnet", True)])
def test_every_parameter_gets_a_finite_gradient(name, upsample):
    made = student(name, upsample=upsample).train()
    found = made(images(160))
    (found.summary.square().mean() + found.tokens.square().mean()).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(("name", "millions"), list(zip(TABLE_6, PAPER_MILLIONS, strict=True)))
def test_the_papers_ten_have_its_parameter_counts_and_a_map_of_7_by_7(name, millions):
    with torch.device("meta"):
        made = students[f"timm:{name}"](TimmOptions()).eval()
        found = made(torch.empty(1, 3, 224, 224))
    assert isinstance(made, nn.Module)
    head = 1000 * (made.summary_dim + 1)
    assert (sum(parameter.numel() for parameter in made.parameters()) + head) // 1_000_000 == millions
    assert made.native_size == (224, 224)
    assert found.grid == (7, 7)
    assert found.summary.shape == (1, made.summary_dim)


@pytest.mark.parametrize("name", ["test_maxvit", "test_vit_relpos", "swinv2_tiny_window8_256", "mvitv2_tiny"])
def test_models_of_one_size_are_built_for_the_size_wanted_and_refuse_others(name):
    with torch.device("meta"):
        made = student(name, image_size=96).eval()
        assert made(torch.empty(1, 3, 96, 96)).grid == (96 // made.trunk.stride,) * 2
        assert made.native_size == made.nearest_size(224, 160) == (96, 96)
        with pytest.raises(SizeError, match=r"224x224 px: it was built for 96x96 px alone; .*--student"):
            made(torch.empty(1, 3, 224, 224))


def test_swin_v2_scales_its_windows_with_the_map():
    with torch.device("meta"):
        layers = make_network("swinv2_tiny_window8_256", 96)[0].layers
    assert [layer.blocks[0].window_size for layer in layers] == [(3, 3)] * 4


def test_convolutional_models_take_multiples_of_their_stride():
    made = student("test_resnet").eval()
    assert made.nearest_size(100, 250) == (96, 256)
    assert made(torch.rand(1, 3, 64, 96)).grid == (2, 3)
    with pytest.raises(SizeError, match=r"100x100 px: its stride of 32 .*nearest size is 96x96"):
        made(images(100))
    with pytest.raises(SizeError, match=r"cannot be built for 100 px.*nearest is 96"):
        student("test_resnet", image_size=100)


def test_models_that_resample_their_positions_take_every_multiple_of_their_patch():
    made = student("test_vit", image_size=96).eval()
    assert made.native_size == (96, 96) and made.nearest_size(224, 170) == (224, 176)
    assert made(torch.rand(1, 3, 64, 96)).grid == (4, 6)
    with pytest.raises(SizeError, match=r"100x100 px: its stride of 16 .*nearest size is 96x96"):
        made(images(100))


def test_a_forward_in_training_draws_nothing():
    made = student("swinv2_tiny_window8_256", image_size=64).train()  # stochastic depth of 0.1 by itself
    assert timm.create_model("swinv2_tiny_window8_256").layers[3].blocks[1].drop_path1.drop_prob > 0.05
    with torch.no_grad():
        first, again = made(images(64)), made(images(64))
    assert made.sample_crops(2, torch.Generator()) is None
    assert torch.equal(first.tokens, again.tokens)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for activation_checkpointing in (False, True):
        made = student("test_convnext", activation_checkpointing=activation_checkpointing).train()
        assert made.trunk.network.stages[0].grad_checkpointing is activation_checkpointing
        made(images(64)).tokens.square().mean().backward()
        gradients.append([parameter.grad for parameter in made.trunk.network.stages.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnetv2_1O1", {}, r"timm has no model 'resnetv2_1O1'; did you mean resnetv2_101"),
        ("test_vit.q", {}, r"timm has no weights 'test_vit\.q'; known: test_vit, test_vit\.r160_in1k"),
        ("qqqqqq", {}, r"timm has no model 'qqqqqq'; timm\.list_models\(\) lists all 1\d\d\d"),
        ("test_vit", {"upsample": True}, "has no stage at twice the last one's resolution"),
    ],
)
def test_what_cannot_be_is_one_clear_error(name, options, said):
    with pytest.raises(ConfigError, match=said):
        student(name, **options)


@pytest.mark.parametrize(("name", "given"), [("coat_tiny", "list"), ("volo_d1_224", r"\[1, 197, 384\]")])
def test_a_model_without_a_last_map_is_an_error(name, given):
    with torch.device("meta"):
        made = student(name)
        with pytest.raises(ConfigError, match=rf"timm:{name} gives {given} where .* it has no map"):
            made(torch.empty(1, 3, 224, 224))


def test_names_with_and_without_an_entry_of_their_own():
    assert "timm:resnetv2_101" in list(students)
    assert "timm:test_resnet" in students
    assert "timm:nonsense" not in students


def test_the_fingerprint_covers_weights_and_the_size_that_was_built_for():
    assert student("test_vit").fingerprint == student("test_vit").fingerprint
    assert student("test_vit").fingerprint != student("test_vit", image_size=96).fingerprint
    assert student("test_resnet").fingerprint == student("test_resnet", image_size=96).fingerprint
