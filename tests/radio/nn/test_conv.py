"""The convolutional parts of a hybrid student, against their operations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio.nn.hybrid import C2f, ChannelAffine, ConvNorm, Downsample, Neck, StridedStem


def _maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def seen():
    """A function that draws weights and statistics of every norm anew, so that each one matters."""

    def draw(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(2)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for values, low, high in (
                    (norm.weight.data, 0.5, 1.5),
                    (norm.bias.data, -0.5, 0.5),
                    (norm.running_mean, -0.5, 0.5),
                    (norm.running_var, 0.5, 2.0),
                ):
                    values.uniform_(low, high, generator=generator)
        return module.eval()

    return draw


def _normed(x: Tensor, block: ConvNorm) -> Tensor:
    """Convolution and batch norm by their definition."""
    conv, norm = block.conv, block.norm
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    return (y - mean) / torch.sqrt(var + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]


@torch.inference_mode()
def test_c2f_is_a_chain_on_one_half_and_keeps_every_link(seen):
    block = seen(C2f(12, 2))
    x = _maps(2, 12, 5, 6)
    first, second = F.silu(_normed(x, block.cv1)).split(6, dim=1)
    pieces = [first, second]
    for bottleneck in block.bottlenecks:
        inner = F.silu(_normed(pieces[-1], bottleneck.layers[0]))
        pieces.append(pieces[-1] + F.silu(_normed(inner, bottleneck.layers[1])))
    wanted = F.silu(_normed(torch.cat(pieces, dim=1), block.cv2))
    assert len(pieces) == 4
    torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-5)


# By hand: how many pixels left and right of its own an output pixel sees.
@pytest.mark.parametrize(
    ("strides", "side", "beyond"),
    [((2, 2), 4, (3, 0)), ((3, 1), 3, (4, 4)), ((1, 3), 3, (2, 2)), ((2, 1), 2, (3, 2))],
)
def test_the_stem_divides_the_sides_and_sees_its_neighbours(seen, strides, side, beyond):
    stem = seen(StridedStem(8, inner=16, strides=strides))
    assert stem(torch.zeros(2, 3, 5 * side, 7 * side)).shape == (2, 8, 5, 7)
    for block in stem:
        block.activation = nn.Identity()
    images = torch.zeros(1, 3, 9 * side, 9 * side, requires_grad=True)
    (touched,) = torch.autograd.grad(stem(images)[0, :, 4, 4].sum(), images)
    rows = touched.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert rows == list(range(4 * side - beyond[0], 5 * side + beyond[1]))


@torch.inference_mode()
def test_downsampling_halves_and_doubles_without_activation(seen):
    down = seen(Downsample(4))
    x = _maps(2, 4, 6, 8)
    assert down(x).shape == (2, 8, 3, 4)
    assert (down(x) < 0).any()
    torch.testing.assert_close(down(x), _normed(x, down), rtol=0, atol=1e-5)
    assert [tuple(p.shape) for p in down.parameters()] == [(8, 4, 3, 3), (8,), (8,)]


@torch.inference_mode()
def test_the_lateral_neck_by_hand():
    neck = Neck(2, 4, "lateral")
    for parameter in neck.parameters():
        parameter.normal_()
    before, last = _maps(1, 2, 6, 4), _maps(1, 4, 3, 2)
    wanted = torch.zeros(1, 4, 6, 4)
    up, lateral = neck.up, neck.lateral
    for row in range(6):
        for column in range(4):
            tap = up.weight[:, :, row % 2, column % 2]  # [in, out]
            wanted[0, :, row, column] = (
                last[0, :, row // 2, column // 2] @ tap
                + up.bias
                + lateral.weight[:, :, 0, 0] @ before[0, :, row, column]
                + lateral.bias
            )
    torch.testing.assert_close(neck(before, last), wanted, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_the_other_neck_adds_to_stage_3():
    neck = Neck(6, 12, "stage-3")
    before, last = _maps(2, 6, 6, 4), _maps(2, 12, 3, 2)
    added = neck(before, last) - before
    assert added.shape == (2, 6, 6, 4)
    torch.testing.assert_close(neck(torch.zeros_like(before), last), added, rtol=0, atol=1e-5)
    # A 3x3 kernel of stride 2 lies centred on every other pixel: an odd row between two of them sees both.
    impulse = torch.zeros(1, 12, 3, 3)
    impulse[0, :, 1, 1] = 1.0
    neck.up.bias.zero_()
    touched = neck.up(impulse).abs().sum(dim=1)[0] > 1e-6
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[1:4, 1:4] = True
    assert torch.equal(touched, wanted)


@pytest.mark.parametrize("kind", ["lateral", "stage-3"])
def test_both_necks_weigh_the_same(kind):
    weights = [p for p in Neck(64, 128, kind).parameters() if p.ndim == 4]
    assert sum(weight.numel() for weight in weights) == 288 * 16**2  # 288 d^2, of d = 16


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, None])
@torch.inference_mode()
def test_a_folded_norm_gives_the_same_and_folds_once(seen, activation):
    block = seen(ConvNorm(4, 6, 3, 2, activation))
    x = _maps(2, 4, 6, 8)
    before = block(x)
    block.fold()
    weight = block.conv.weight
    block.fold()
    assert block.conv.weight is weight
    assert not [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_norm_as_an_affine_map(seen):
    norm = seen(nn.BatchNorm2d(5))
    x = _maps(3, 5, 4, 4)
    torch.testing.assert_close(ChannelAffine(norm)(x), norm(x), rtol=0, atol=1e-6)
