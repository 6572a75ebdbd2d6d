"""What a training takes, by hand, and what is done about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evals.vqa.settings import VqaSettings
from evals.vqa.training import plan_memory
from radio.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BF16 = VqaSettings(precision="bf16")


def network(learning: int, frozen: int = 0) -> nn.Module:
    """Weights without memory."""
    model = nn.Module()
    model.learned = nn.Parameter(torch.empty(learning, device="meta"))
    model.frozen = nn.Parameter(torch.empty(frozen, device="meta"), requires_grad=False)
    return model


@pytest.fixture(autouse=True)
def large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB that nobody has."""
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_7b_model_is_sharded_on_gpus_and_its_activations_are_computed_again() -> None:
    needs = plan_memory(network(6_740_000_000), VqaSettings(), GPU, 8)
    assert needs.is_sharded and needs.is_checkpointed
    assert needs.gigabytes == pytest.approx(16 * 6.74 / 8)
    assert needs.describe() == " (13 GB a rank before activations, sharded, activations recomputed)"


def test_what_no_gpu_holds_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"keeps 108 GB on every GPU .* has 80; shard it over more GPUs"):
        plan_memory(network(6_740_000_000), VqaSettings(), GPU, 1)


def test_frozen_weights_of_large_models_are_halved_under_bf16() -> None:
    model = network(20_000_000, 6_740_000_000)
    needs = plan_memory(model, BF16, GPU, 8)
    assert (model.frozen.dtype, model.learned.dtype) == (torch.bfloat16, torch.float32)
    assert not needs.is_sharded and needs.gigabytes == pytest.approx(2 * 6.74 + 16 * 0.02)
    small = network(10, 1000)
    assert plan_memory(small, BF16, GPU, 1).describe() == "" and small.frozen.dtype == torch.float32
    whole = network(10, 2_000_000_000)
    assert plan_memory(whole, VqaSettings(), CPU, 1).gigabytes == pytest.approx(8.0)


def test_settings_decide() -> None:
    asked = plan_memory(network(1000), VqaSettings(fsdp=True, activation_checkpointing=True), GPU, 2)
    assert (asked.is_sharded, asked.is_checkpointed) == (True, True)
    refused = plan_memory(network(2_000_000_000), VqaSettings(activation_checkpointing=False), CPU, 2)
    assert (refused.is_sharded, refused.is_checkpointed) == (False, False)
    assert not plan_memory(network(1000), VqaSettings(fsdp=True), CPU, 1).is_sharded
    with pytest.raises(ConfigError, match="--fsdp shards over GPUs, and the device is cpu; leave it out"):
        plan_memory(network(1000), VqaSettings(fsdp=True), CPU, 2)
