"""The protocol with a clock of its own, and counts against timm's and hand values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radio.benchmark import (
    MIB,
    PRESETS,
    BenchmarkModel,
    CostCounter,
    Measurement,
    Protocol,
    alternate,
    count,
    is_convolutional,
    measure,
    num_turns,
    peak_memory,
    prepare,
)
from radio.errors import ConfigError
from radio.model import AdaptorConfig, ModelConfig, build, make_student
from radio.students import StudentOptions, students

CPU = torch.device("cpu")
PROTOCOL = Protocol(batches=(1, 4), warmup_seconds=3, repeats=5, repeat_seconds=1)


class World:
    """Models that take a given time for an image, on a clock that only they move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def model(self, name: str, *seconds: float) -> BenchmarkModel:
        """Takes the first time for the first call, the second for the second, and the last from then on."""
        left = list(seconds)

        def call(images: Tensor) -> None:
            assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled()
            self.now += (left.pop(0) if len(left) > 1 else left[0]) * len(images)
            self.log.append(name)

        return BenchmarkModel(name=name, call=call, images=lambda batch: torch.zeros(batch, 3, 2, 2))


def test_the_median_over_windows_and_the_slowest_and_fastest():
    one = Measurement(
        name="a", variant="alone", batch=4, rates=(10.0, 30.0, 20.0, 90.0, 21.0), calls=3, peak_memory=None
    )
    assert (one.images_per_second, one.low, one.high) == (21.0, 10.0, 90.0)
    assert one.spread == pytest.approx(50 * 80 / 21)


def test_rates_are_images_by_seconds_at_every_batch():
    world = World()
    models = [world.model("a", 0.25), world.model("b", 0.5)]
    found = measure(models, PROTOCOL, CPU, clock=world.clock)
    assert [(one.name, one.batch) for one in found] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert [one.rates for one in found] == [(4.0,) * 5, (2.0,) * 5] * 2
    assert [one.calls for one in found] == [4, 2, 1, 1]  # a window of a second, or one call


def test_models_take_turns_window_by_window():
    world = World()
    turns: list[str] = []
    models = [world.model("a", 0.5), world.model("b", 1.0)]
    protocol = replace(PROTOCOL, batches=(1,), warmup_seconds=0, repeats=3)
    measure(models, protocol, CPU, clock=world.clock, done=turns.append)
    assert "".join(world.log) == "ab" + "aab" * 3
    assert "".join(turns) == "ab" + "ab" * 3
    assert len(turns) == num_turns(protocol, 2)


def test_the_warm_up_lasts_its_seconds_and_its_calls_and_does_not_count():
    world = World()
    slow_first = world.model("a", 60.0, 0.5)
    protocol = replace(PROTOCOL, batches=(1,), warmup_calls=3, repeats=1)
    (found,) = measure([slow_first], protocol, CPU, clock=world.clock)
    assert found.rates == (2.0,)
    assert len(world.log) == 3 + 2  # 60.0 + 0.5 + 0.5 to warm up, two calls a window by the fastest call
    world = World()
    measure([world.model("b", 0.5)], replace(protocol, warmup_calls=1), CPU, clock=world.clock)
    assert len(world.log) == 6 + 2  # six calls fill three seconds


def test_a_disturbance_moves_the_spread_but_not_the_median():
    world = World()
    steady, shaken = world.model("a", 1.0), world.model("b", 1.0, 1.0, 1.0, 1.0, 9.0, 1.0)
    _, found = measure([steady, shaken], replace(PROTOCOL, batches=(1,)), CPU, clock=world.clock)
    assert found.images_per_second == 1.0
    assert found.low == pytest.approx(1 / 9)


def test_a_compiled_models_first_call_is_before_the_warm_up():
    world = World()
    model = replace(world.model("a", 100.0, 0.5), compiled=True)
    measure([model], replace(PROTOCOL, batches=(1,), repeats=1), CPU, clock=world.clock)
    assert len(world.log) == 1 + 6 + 2


def test_timms_preset_is_ten_calls_and_forty_of_256_images():
    world = World()
    measure([world.model("a", 0.001)], PRESETS["timm"], CPU, clock=world.clock)
    assert len(world.log) == 10 + 40
    assert PRESETS["timm"].batches == (256,)


@pytest.mark.parametrize(
    "changes",
    [{"batches": ()}, {"batches": (0,)}, {"repeats": 0}, {"warmup_seconds": -1.0}, {"repeat_calls": 0}],
)
def test_a_protocol_that_cannot_be_is_an_error(changes):
    with pytest.raises(ConfigError, match="cannot be measured: give at least one batch"):
        replace(PROTOCOL, **changes)


@pytest.mark.parametrize("name", ["vit-tiny12", "timm:test_resnet", "timm:test_vit"])
def test_counts_without_computing_are_those_of_a_real_forward(name):
    student = make_student(name, StudentOptions()).eval()
    assert isinstance(student, nn.Module)
    math_only = sdpa_kernel(SDPBackend.MATH)  # the counter does not see into the CPU's fused attention
    with torch.no_grad(), math_only, FlopCounterMode(display=False) as counter:
        student(torch.rand(1, 3, *student.native_size))
    found = count(student, student.native_size)
    assert found.gmacs == pytest.approx(counter.get_total_flops() / 2e9)
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())


def test_a_convolutions_multiply_adds_by_hand():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    assert count(conv, (10, 12)).gmacs == pytest.approx(5 * 6 * 8 * 3 * 9 / 1e9)
    assert count(conv, (10, 12)).parameters == 8 * 3 * 9 + 8


def test_timms_resnet_50_has_its_published_counts():
    with torch.device("meta"):
        found = count(timm.create_model("resnet50"), (224, 224))
    assert found.parameters == 25_557_032  # torchvision's
    assert found.gmacs == pytest.approx(4.09, abs=0.01)  # torchvision's table: 4.09 GFLOPS


def test_with_adaptors_costs_the_adaptors_on_top():
    heads = (AdaptorConfig(name="clip", summary_dim=5, token_dim=7, hidden=11),)
    model = build(ModelConfig(student="vit-tiny12", adaptors=heads), 0).eval()
    width, tokens = 128, 64
    adaptor = (1 + tokens) * width * 11 + 11 * 5 + tokens * 11 * 7
    alone, adapted = (
        prepare("x", model, (96, 96), CPU, torch.float32, adaptors=with_) for with_ in (False, True)
    )
    assert (alone.variant, adapted.variant) == ("alone", "with adaptors")
    images = alone.images(1)
    with torch.no_grad():
        with CostCounter() as counter:
            features = model(images)
        with CostCounter() as more:
            outputs: Any = adapted.call(images)
    assert more.flops - counter.flops == 2 * adaptor
    torch.testing.assert_close(outputs[0].tokens, features.tokens)
    torch.testing.assert_close(outputs[1].summary, model.adapt("clip", features).summary)


@pytest.mark.parametrize(("name", "last"), [("vit-tiny12", False), ("timm:test_resnet", True)])
def test_convolutional_models_are_called_in_channels_last(name, last):
    student = make_student(name, StudentOptions())
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, images: Tensor) -> object:
            seen.append(images)
            assert not self.training
            return self.student(images)

    contender = prepare("x", Spy().train(), (96, 96), CPU, torch.bfloat16)
    contender.call(contender.images(2))
    assert is_convolutional(student) is last
    assert seen[0].is_contiguous(memory_format=torch.channels_last) is last
    assert seen[0].shape == (2, 3, 96, 96) and seen[0].dtype == torch.bfloat16
    assert contender.weight_bytes == 2 * sum(p.numel() for p in student.parameters())
    assert torch.equal(seen[0], prepare("x", student, (96, 96), CPU, torch.bfloat16).images(2))


def test_peak_memory_sees_what_was_freed_again():
    with peak_memory(CPU) as peak:
        torch.ones(64 * MIB // 4).sum()
    assert peak[0] is not None
    assert 60 < peak[0] / MIB < 90
    with peak_memory(CPU) as nothing:
        pass
    assert nothing[0] is not None and nothing[0] < 8 * MIB


def test_a_real_model_is_measured():
    model: Callable[[Tensor], object] = students["vit-tiny12"](StudentOptions()).eval()
    short = Protocol(batches=(1,), warmup_seconds=0, repeats=2, repeat_seconds=0)
    (found,) = measure([prepare("tiny", model, (48, 48), CPU, torch.float32)], short, CPU)
    assert found.calls == 1 and len(found.rates) == 2 and found.low > 0
    assert found.peak_memory is not None and found.peak_memory > 4  # its weights alone are 4.1 MiB


def test_bytes_that_are_held() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    with CostCounter() as counter:
        doubled = weight * 2
        view = doubled.view(10, 100)[1:]
        assert counter.now == 4000  # a view is no storage of its own
        whole = (view + 1).sum()
        assert (counter.now, counter.peak) == (4004, 4000 + 3600 + 4)
        del doubled
        assert counter.now == 4004  # the view still holds it
        del view
        assert counter.now == 4
        assert float(whole.detach()) == 900
    with CostCounter() as counter:
        (weight.exp() * 3).sum().backward()
        assert counter.now == 4000  # the gradient
        weight.grad = None
        assert counter.now == 0


def test_recomputed_graphs_are_let_go() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4))
    x = torch.zeros(100, 64, requires_grad=True)
    with CostCounter() as counter:
        y = x
        for layer in layers:
            y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
        y.sum().backward()
        del y
        x.grad = None
        layers.zero_grad(set_to_none=True)
        assert counter.now == 0


def test_operations_are_those_of_torchs_counter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 16), nn.GELU())
    x = torch.randn(2, 3, 16, 16)
    with CostCounter() as ours:
        model(x).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        model(x).sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_attention_by_the_fused_kernel() -> None:
    q = torch.zeros(2, 4, 10, 16, requires_grad=True)
    with CostCounter() as counter:
        out = F.scaled_dot_product_attention(q, q, q).sum()
        assert counter.flops == 2 * (2 * 2 * 4 * 10 * 10 * 16)  # q k and its product with v
        out.backward()
        assert counter.flops == (2 + 5) * (2 * 2 * 4 * 10 * 10 * 16)  # the backward makes q k anew


def test_jobs_alternate_forwards_and_backwards() -> None:
    order: list[str] = []
    seconds = alternate([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "abbaab"
    assert len(seconds) == 2 and min(seconds) >= 0
