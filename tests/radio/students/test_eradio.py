"""The E-RADIO students: the published counts and costs, sizes and windows, and deployment."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from radio.errors import ConfigError, SizeError
from radio.model import make_student
from radio.nn.hybrid import MultiResolutionBlock
from radio.students import ERadioOptions, StudentOptions, students
from radio.students.eradio import ERadio, ERadioConfig
from radio.students.timm import TimmOptions
from radio.students.vit import ViTOptions
from radio.types import Features, Student

# Parameters without a head, without and with up-sampling, and GMACs at 224 px (AM-RADIO's table 6).
PUBLISHED = {
    "xt": (26_130_240, 27_310_912, 2.38),
    "t": (40_755_392, 42_599_872, 3.65),
    "s": (63_453_376, 66_109_120, 6.00),
    "b": (112_679_744, 117_400_384, 10.54),
    "l": (253_298_752, 263_918_656, 23.45),
}
SMALL = ERadioConfig(
    name="small", width=8, depths=(1, 1, 2, 2), native=96, strides=(2, 1), inner=8, heads=(2, 4)
)


def _images(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def _close(found: Features, wanted: Features, atol: float = 1e-5) -> None:
    assert found.grid == wanted.grid
    torch.testing.assert_close(found.summary, wanted.summary, rtol=0, atol=atol)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=atol)


def _on_meta(name: str) -> ERadio:
    with torch.device("meta"):
        student = students[name](StudentOptions())
    assert isinstance(student, ERadio)
    return student.eval()


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def trained() -> Callable[..., ERadio]:
    """A function that builds a small E-RADIO whose weights and statistics are far from the start."""

    def make(**changes: object) -> ERadio:
        torch.manual_seed(5)
        student = ERadio(replace(SMALL, **changes))  # type: ignore[arg-type]
        with torch.no_grad():
            for module in student.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
                elif isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.3, 0.3)
            for _ in range(30):
                student.train()(torch.rand(4, 3, 64, 64))
        return student.eval()

    return make


@pytest.mark.parametrize("letter", PUBLISHED)
def test_parameters_are_those_of_table_6(letter):
    without, with_neck, _ = PUBLISHED[letter]
    assert _parameters(_on_meta(f"e-radio-{letter}-noup")) == without
    assert _parameters(_on_meta(f"e-radio-{letter}")) == with_neck


@pytest.mark.parametrize(("name", "millions"), [("b", 118), ("b-noup", 113), ("l", 265)])
def test_with_a_head_of_a_thousand_classes_the_counts_truncate_to_the_papers(name, millions):
    student = _on_meta(f"e-radio-{name}")
    with torch.device("meta"):
        head = nn.Linear(student.summary_dim, 1000)
    assert (_parameters(student) + _parameters(head)) // 10**6 == millions


@pytest.mark.parametrize("letter", PUBLISHED)
def test_multiplications_at_224_px(letter):
    student = _on_meta(f"e-radio-{letter}")
    with FlopCounterMode(display=False) as counter:
        student(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[letter][2], rel=0.02)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((224, 224), 7),
        ((224, 448), 7),
        ((256, 256), 8),
        ((384, 384), 12),
        ((512, 512), 16),
        ((320, 480), 5),
        ((1024, 1024), 16),
        ((544, 544), 17),
        ((128, 896), 4),
    ],
)
def test_the_window_follows_the_size(size, window):
    student, seen = _on_meta("e-radio-xt"), set()
    for block in (*student.stage3, *student.stage4):
        block.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[1]))
    grid = size[0] // 16, size[1] // 16
    found = student(torch.empty(2, 3, *size, device="meta"))
    assert seen == {window} and student.nearest_size(*size) == size
    assert found.grid == grid
    assert found.tokens.shape == (2, grid[0] * grid[1], 512) and found.summary.shape == (2, 512)
    without = _on_meta("e-radio-xt-noup")(torch.empty(2, 3, *size, device="meta"))
    assert without.grid == (grid[0] // 2, grid[1] // 2) and without.tokens.shape[-1] == 512


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((225, 225), (224, 224)), ((32, 32), (128, 128)), ((96, 96), (128, 128)), ((224, 256), (256, 256))],
)
def test_a_size_that_no_window_divides_names_the_nearest(size, nearest):
    student = _on_meta("e-radio-xt")
    message = rf"cannot take {size[0]}x{size[1]} px.* window of 4 or more .* {nearest[0]}x{nearest[1]}$"
    with pytest.raises(SizeError, match=message):
        student(torch.empty(1, 3, *size, device="meta"))
    assert student.nearest_size(*size) == nearest


def test_fit_is_the_nearest_of_all_sizes_that_it_takes():
    student = _on_meta("e-radio-xt")
    taken = [(32 * a, 32 * b) for a in range(1, 30) for b in range(1, 30) if math.gcd(a, b) >= 4]
    for asked in ((225, 225), (32, 700), (500, 333), (130, 610), (777, 401), (1, 1), (544, 620)):
        fitted = student.nearest_size(*asked)
        assert fitted in taken
        assert math.dist(fitted, asked) == min(math.dist(size, asked) for size in taken)


def test_a_window_of_ones_own():
    student = _on_meta("e-radio-xt")
    chosen = student.with_window(8)
    assert student.with_window is not None and student.window is None
    assert chosen.nearest_size(500, 300) == (512, 256)
    chosen(torch.empty(1, 3, 512, 256, device="meta"))
    with pytest.raises(SizeError, match=r"a 7x7 grid does not divide into 8x8 windows; .*: 1 and 7;"):
        chosen(torch.empty(1, 3, 224, 224, device="meta"))
    with pytest.raises(SizeError, match=r"225x225 px.* a window of 8 of them .* 256x256$"):
        chosen(torch.empty(1, 3, 225, 225, device="meta"))
    student.with_window(2)(torch.empty(1, 3, 64, 64, device="meta"))  # below 4, but not silently
    assert chosen.with_window(None).nearest_size(225, 225) == (224, 224)
    with pytest.raises(SizeError, match="a window of 0 tokens cannot be"):
        student.with_window(0)


def _stage_by_loop(blocks: nn.ModuleList, x: Tensor, side: int) -> Tensor:
    """Blocks on a map, one window after the other."""
    for block in blocks:
        if not isinstance(block, MultiResolutionBlock):
            x = _windows_by_loop(block, x, side)
        elif block.halved:
            x = x + block.up(_windows_by_loop(block.block, block.down(x), side))
        else:
            x = _windows_by_loop(block.block, x, side)
    return x


def _windows_by_loop(block: nn.Module, x: Tensor, side: int) -> Tensor:
    out = torch.empty_like(x)
    for image in range(x.shape[0]):
        for top in range(0, x.shape[2], side):
            for left in range(0, x.shape[3], side):
                window = x[image, :, top : top + side, left : left + side]
                mixed = block(window.flatten(1).T[None], side)[0]
                out[image, :, top : top + side, left : left + side] = mixed.T.unflatten(1, (side, side))
    return out


@pytest.mark.parametrize(
    ("size", "asked", "side"),
    [
        ((64, 128), None, 4),
        ((96, 96), None, 6),
        ((80, 160), None, 5),
        ((128, 128), None, 8),
        ((128, 128), 4, 4),
    ],
)
@torch.inference_mode()
def test_features_equal_a_loop_over_windows_when_the_resolution_changes(trained, size, asked, side):
    student = trained().with_window(asked)  # its weights have seen 64 px, with windows of 4
    images = _images(2, *size)
    x = student.down1(student.stage1(student.stem(student.normalise(images))))
    x = _stage_by_loop(student.stage3, student.down2(student.stage2(x)), side)
    last = student.norm(_stage_by_loop(student.stage4, student.down3(x), side))
    plane = student.neck(x, last)
    wanted = Features(last.mean(dim=(2, 3)), plane.flatten(2).transpose(1, 2), tuple(plane.shape[2:]))
    _close(student(images), wanted)
    assert wanted.grid == (size[0] // 8, size[1] // 8)


@torch.inference_mode()
def test_without_up_sampling_the_tokens_are_stage_4s_map(trained):
    student = trained()
    without = replace(student.config, neck=None)
    bare = ERadio(without).eval()
    bare.load_state_dict({k: v for k, v in student.state_dict().items() if not k.startswith("neck")})
    found = bare(_images(2, 64, 128))
    assert found.grid == (4, 8) and found.tokens.shape == (2, 32, 64)
    torch.testing.assert_close(found.summary, found.tokens.mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.summary, student(_images(2, 64, 128)).summary, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_what_the_paper_leaves_open_can_be_set(trained):
    images = _images(1, 64, 64)
    student = trained()
    swapped, halved = (ERadio(replace(SMALL, **{k: v})) for k, v in (("ratios", (1, 2)), ("mix", 0.5)))
    assert [block.halved for block in student.stage3] == [True, False] * 2
    assert [block.halved for block in swapped.stage3] == [False, True] * 2
    halved.eval().load_state_dict(student.state_dict())
    assert (halved(images).summary - student(images).summary).abs().max() > 1e-3
    narrow = ERadio(replace(SMALL, neck="stage-3")).eval()
    assert narrow(images).tokens.shape == (1, 64, 32) and narrow.token_dim == 32 and narrow.summary_dim == 64


@pytest.mark.parametrize("neck", ["lateral", None])
@torch.inference_mode()
def test_fused_features_are_the_same_and_the_original_stays(trained, neck):
    student = trained(neck=neck)
    images, before = _images(2, 64, 128), student.fingerprint
    fused = student.fuse()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    _close(fused(images), student(images), atol=1e-4)
    assert student.fingerprint == before and student.train().fuse().training is False
    assert len([m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]) == 14
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in student.parameters()}
    _close(fused.fuse()(images), fused(images), atol=0)


@torch.inference_mode()
def test_channels_last_is_the_default_and_gives_what_contiguous_gives(trained):
    student = trained()
    images = _images(2, 64, 128)
    layouts = set()
    for module in student.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            module.register_forward_hook(
                lambda _, __, x: layouts.add(x.is_contiguous(memory_format=torch.channels_last))
            )
    found = student(images)
    assert layouts == {True}
    assert found.tokens.is_contiguous()
    layouts.clear()
    for module in student.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_pre_hook(lambda _, x: tuple(map(torch.Tensor.contiguous, x)))
    _close(student(images), found)
    assert False in layouts


def test_every_weight_is_contiguous_as_fsdp_wants_it(trained):
    for student in (trained(), students["e-radio-xt"](StudentOptions())):
        assert all(parameter.is_contiguous() for parameter in student.parameters())


class _Saved:
    """How many numbers a forward keeps for its backward."""

    count = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.count += tensor.numel()
        return tensor


def test_recomputing_gives_the_same_gradients_and_statistics():
    images, found = _images(2, 64, 64), []
    for activation_checkpointing in (False, True):
        torch.manual_seed(3)
        student = ERadio(replace(SMALL, activation_checkpointing=activation_checkpointing))
        saved = _Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = student.train()(images).tokens.square().mean()
        loss.backward()
        grads = {key: parameter.grad for key, parameter in student.named_parameters()}
        found.append((grads, dict(student.named_buffers()), saved.count))
    (grads, buffers, much), (again, same, little) = found
    torch.testing.assert_close(again, grads, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(same, buffers, rtol=0, atol=0)
    assert little < much / 2


def _recomputed(*, compiled: bool) -> list[np.ndarray]:
    """Gradients and buffers after one step of a student that recomputes its blocks."""
    images = _images(2, 64, 64)
    torch.manual_seed(3)
    student = ERadio(replace(SMALL, depths=(1, 1, 1, 1), activation_checkpointing=True)).train()
    model = torch.compile(student, fullgraph=True, backend="aot_eager") if compiled else student
    model(images).tokens.square().mean().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    return [tensor.numpy() for tensor in (*gradients, *student.buffers())]


@pytest.mark.slow
def test_recomputing_in_a_compiled_graph():
    # In a process of its own: a compiled backward pass starts threads, after which no test could fork.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        found = pool.submit(_recomputed, compiled=True).result()
    expected = _recomputed(compiled=False)
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_every_parameter_learns_and_one_image_is_enough_for_the_norms():
    torch.manual_seed(0)
    student = students["e-radio-tiny"](StudentOptions())
    assert isinstance(student, ERadio) and isinstance(student, Student)
    assert student.sample_crops(4, torch.Generator()) is None
    found = student.train()(_images(1, 96, 96))
    (found.summary.square().mean() + found.tokens.square().mean()).backward()
    without = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@torch.inference_mode()
def test_signals_neither_vanish_nor_explode_at_the_start():
    torch.manual_seed(0)
    student = students["e-radio-xt"](StudentOptions())
    assert isinstance(student, ERadio)
    found = student.train()(_images(4, 128, 128))
    assert 0.3 < found.tokens.std() < 3 and 0.05 < found.summary.std() < 3


def test_the_tiny_member_on_scenes():
    for name, stride in (("e-radio-tiny", 12), ("e-radio-tiny-noup", 24)):
        student = students[name](StudentOptions())
        assert student.native_size == (96, 96)
        assert student.nearest_size(160, 160) == (168, 168)
        for side in (96, 168, 192):
            assert student.nearest_size(side, side) == (side, side)
            assert student.eval()(_images(1, side, side)).grid == (side // stride, side // stride)


@torch.inference_mode()
def test_at_the_start_the_neck_repeats_the_last_map():
    torch.manual_seed(0)
    student = students["e-radio-tiny"](StudentOptions()).eval()
    assert isinstance(student, ERadio)
    images = _images(2, 96, 192)
    found = student(images)
    student.neck = None
    plain = student(images)
    assert torch.equal(found.map(), F.interpolate(plain.map(), scale_factor=2, mode="nearest"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ViTOptions(registers=4), "student 'e-radio-b' has ERadioOptions, got ViTOptions; give it its own"),
        (TimmOptions(upsample=True), "has ERadioOptions, got TimmOptions"),
        (ERadioOptions(window=0), "e-radio-b.window: 0 is out of bounds; give a number of at least 1"),
    ],
)
def test_options_that_it_does_not_have_are_errors(options, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        make_student("e-radio-b", options)


def test_options_that_it_has():
    with torch.device("meta"):
        student = students["e-radio-b"](ERadioOptions(window=8, activation_checkpointing=True))
    assert isinstance(student, ERadio)
    assert student.config.window == 8 and student.config.activation_checkpointing


def test_the_fingerprint_counts_weights_and_window_but_not_recomputing(trained):
    student = trained()
    assert student.with_window(4).fingerprint != student.fingerprint
    again = ERadio(replace(student.config, activation_checkpointing=True))
    again.load_state_dict(student.state_dict())
    assert again.fingerprint == student.fingerprint
    assert again.to(memory_format=torch.contiguous_format).fingerprint == student.fingerprint
    next(again.parameters()).data.add_(1e-3)
    assert again.fingerprint != student.fingerprint
