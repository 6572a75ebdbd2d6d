"""Decay groups by name, and the learning rate against hand values."""

from __future__ import annotations

import copy
import math
from typing import Literal

import pytest
import torch
from timm.optim import Lamb
from torch import nn

from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.students.vit import ViTOptions
from train.config import OptimConfig
from train.optim import exempt_from_decay, learning_rate, make_optimizer, orthogonalise


def names_by_decay(model: nn.Module, config: OptimConfig) -> tuple[set[str], set[str]]:
    """The names of the parameters that decay, and of those that do not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = make_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (config.weight_decay, 0.0)
    return ({names[id(p)] for p in decayed["params"]}, {names[id(p)] for p in free["params"]})


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_norms_biases_tokens_and_positions_do_not_decay(stem: str) -> None:
    options = ViTOptions(stem="linear" if stem == "linear" else "conv", registers=2)
    adaptor = AdaptorConfig(name="clip", summary_dim=8, token_dim=8)
    model = build(ModelConfig(student="vit-tiny12", options=options, adaptors=(adaptor,)), 0)
    decayed, free = names_by_decay(model, OptimConfig(weight_decay=0.3))
    assert {"student.prefix", "student.positions.table"} <= free
    assert all(name.endswith(".weight") for name in decayed)
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))}
    matrices = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert norms
    assert norms <= free
    assert decayed == matrices
    assert decayed | free == {name for name, _ in model.named_parameters()}


def test_what_timm_exempts_does_not_decay() -> None:
    named = {
        "timm:vit_tiny_patch16_224": {"cls_token", "pos_embed"},
        "timm:mvitv2_tiny": {"rel_pos_h", "rel_pos_w"},
        "timm:swinv2_tiny_window8_256": {"cpb_mlp", "logit_scale"},
        "timm:maxvit_nano_rw_256": {"rel_pos"},
    }
    for student, words in named.items():
        with torch.device("meta"):
            model = RadioModel(ModelConfig(student=student))
        exempt = exempt_from_decay(model)
        names = {name for name, weight in model.named_parameters() if any(word in name for word in words)}
        assert exempt & {name for name, _ in model.named_parameters()} == names != set(), student
    model = build(ModelConfig(student="timm:vit_tiny_patch16_224"), 0)
    _, free = names_by_decay(model, OptimConfig(weight_decay=0.3))
    assert {"student.trunk.network.pos_embed", "student.trunk.network.cls_token"} <= free


def test_decay_shrinks_matrices_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = model.state_dict()
    assert torch.allclose(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(after[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


def test_a_guarded_step_is_that_of_clipped_gradients() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    ends = []
    for guarded in (False, True):
        model = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in gradients)
        optimizer = make_optimizer(model, OptimConfig(lr=0.1))
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = gradient.clone()
        if guarded:
            assert optimizer.guard(torch.tensor(5.0), 2.0)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        ends.append([optimizer.state[parameter]["exp_avg"] for parameter in model])
    assert torch.allclose(torch.cat(ends[0]), torch.cat(ends[1]), rtol=1e-6)
    assert optimizer.guard(torch.tensor(1.5), 2.0)
    assert optimizer.grad_scale == 1.0
    optimizer.guard(torch.tensor(50.0), 0.0)
    assert optimizer.grad_scale is None


@pytest.mark.parametrize("kind", ["adamw", "muon", "lamb"])
@pytest.mark.parametrize("values", [(1.0, float("nan")), (1.0, float("inf")), (float("nan"), 1.0)])
def test_a_step_that_is_not_finite_changes_nothing(
    values: tuple[float, float], kind: Literal["adamw", "muon", "lamb"]
) -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(kind=kind, lr=0.1, weight_decay=0.5))
    for value in values:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fine = optimizer.guard(torch.tensor(value), 1.0)
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert changed == [bool(fine)] * 2
    assert [state["step"].item() for state in optimizer.state.values()] == [1.0, 1.0]
    assert all(torch.isfinite(state["exp_avg"]).all() for state in optimizer.state.values())


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales() -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8)]
    matrices = [torch.randn(shape, generator=source) for shape in shapes]
    for before, after in zip(matrices, orthogonalise(matrices), strict=True):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        core = u.mT @ after @ v.mT
        scales = core.diagonal()
        assert scales.min() > 0.6
        assert scales.max() < 1.3
        assert torch.allclose(core, torch.diag(scales), atol=1e-4)


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch iterates in bfloat16
    torch.manual_seed(0)
    config = OptimConfig(kind="muon", lr=0.05, weight_decay=0.1, betas=(0.9, 0.98))
    ours = nn.Sequential(nn.Linear(12, 6), nn.LayerNorm(6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 8, 1))
    theirs = copy.deepcopy(ours)
    kernel = nn.Parameter(theirs[3].weight.detach().flatten(1))
    by_muon, rest = [theirs[0].weight, kernel], [theirs[0].bias, *theirs[1].parameters(), theirs[3].bias]
    muon = torch.optim.Muon(by_muon, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.05, weight_decay=0.0, betas=(0.9, 0.98))
    optimizer = make_optimizer(ours, config)
    for _ in range(3):
        inputs = torch.randn(5, 12)
        optimizer.zero_grad()
        ours(inputs).square().sum().backward()
        theirs[0].weight.grad, kernel.grad = ours[0].weight.grad.clone(), ours[3].weight.grad.flatten(1)
        for theirs_one, ours_one in zip(
            rest, [ours[0].bias, *ours[1].parameters(), ours[3].bias], strict=True
        ):
            theirs_one.grad = ours_one.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    assert torch.allclose(ours[0].weight, theirs[0].weight, atol=1e-5)
    assert torch.allclose(ours[3].weight.flatten(1), kernel, atol=1e-5)
    for theirs_one, ours_one in zip(rest, [ours[0].bias, *ours[1].parameters(), ours[3].bias], strict=True):
        assert torch.allclose(theirs_one, ours_one, atol=1e-6)


def test_muon_leaves_tokens_positions_and_depthwise_kernels_to_adamw() -> None:
    model = build(ModelConfig(student="timm:mobilenetv3_small_050"), 0)
    optimizer = make_optimizer(model, OptimConfig(kind="muon"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    chosen = {names[id(w)] for group in optimizer.param_groups if group["matrices"] for w in group["params"]}
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    assert chosen == layers - exempt_from_decay(model)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    assert all("exp_avg_sq" in optimizer.state[module.weight] for module in depthwise)
    assert all("exp_avg_sq" not in optimizer.state[w] for w in model.parameters() if names[id(w)] in chosen)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_lamb_is_timms(decay: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(12, 6), nn.LayerNorm(6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 8, 1))
    nn.init.zeros_(ours[3].weight)  # whose ratio is 1 in the first step
    theirs = copy.deepcopy(ours)
    matrices = [weight for weight in theirs.parameters() if weight.ndim > 1]
    rest = [weight for weight in theirs.parameters() if weight.ndim == 1]
    settings = {"lr": 0.05, "betas": (0.9, 0.98)}
    adapted = Lamb(matrices, weight_decay=decay, always_adapt=True, max_grad_norm=None, **settings)
    others = Lamb(rest, weight_decay=0.0, max_grad_norm=None, **settings)
    config = OptimConfig(kind="lamb", lr=0.05, weight_decay=decay, betas=(0.9, 0.98))
    optimizer = make_optimizer(ours, config)
    for _ in range(5):
        optimizer.zero_grad()
        ours(torch.randn(5, 12)).sub(1).square().sum().backward()
        grads = [weight.grad for weight in ours.parameters() if weight.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for weight, grad in zip(theirs.parameters(), grads, strict=True):
            weight.grad = grad / max(float(norm) / 2.0, 1.0)
        assert norm > 2.0  # so that clipping is part of it
        optimizer.guard(norm, 2.0)
        optimizer.step()
        adapted.step()
        others.step()
        for weight, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(weight, wanted, rtol=0, atol=1e-6)


def test_lamb_moves_every_weight_by_its_own_norm() -> None:
    model = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)])
    with torch.no_grad():
        model[1].weight.copy_(100 * model[0].weight)
    optimizer = make_optimizer(model, OptimConfig(kind="lamb", lr=0.1, weight_decay=0.0))
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight, scale in zip(model.parameters(), (1e3, 1e-3), strict=True):
        weight.grad = scale * torch.ones_like(weight)
    optimizer.step()
    for weight, old in zip(model.parameters(), before, strict=True):
        assert float((weight - old).detach().norm() / old.norm()) == pytest.approx(0.1, rel=1e-4)


def test_warm_up_is_one_percent_and_linear() -> None:
    config = OptimConfig(lr=2.0)
    rates = [learning_rate(step, 1000, config) for step in range(11)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(2.0)


def test_cosine_falls_to_zero() -> None:
    config = OptimConfig(lr=1.0, warmup=0.1)
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(10 + 90 // 2, 100, config) == pytest.approx(0.5)
    assert learning_rate(4 + 8, 36, OptimConfig(lr=1.0, warmup=4 / 36)) == pytest.approx(quarter)
    assert learning_rate(99, 100, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert learning_rate(100, 100, config) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(step, 100, config) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_linear_falls_evenly_to_a_share_of_the_rate() -> None:
    config = OptimConfig(lr=4.0, warmup=0.2, schedule="linear", final_lr=0.25)
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates[:3] == pytest.approx([2.0, 4.0, 4.0])
    assert rates[2:] == pytest.approx([4.0 - 3.0 * step / 8 for step in range(9)])


def test_cosine_ends_at_a_share_of_the_rate() -> None:
    config = OptimConfig(lr=4.0, warmup=0.0, final_lr=0.25)
    assert learning_rate(0, 10, config) == pytest.approx(4.0)
    assert learning_rate(5, 10, config) == pytest.approx(2.5)
    assert learning_rate(10, 10, config) == pytest.approx(1.0)


def test_a_run_of_one_step_or_of_warm_up_alone() -> None:
    assert learning_rate(0, 1, OptimConfig(lr=3.0)) == pytest.approx(3.0)
    assert learning_rate(3, 4, OptimConfig(lr=3.0, warmup=1.0)) == pytest.approx(3.0)
