"""Spectral weights and DAMP against singular values, formulas by hand, and runs without either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize

from radio.checkpoint import load as load_checkpoint
from radio.errors import ConfigError
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build, load
from radio.students import StudentOptions
from train.config import (
    MESA_START,
    NormaliseConfig,
    OptimConfig,
    StageConfig,
    TeacherConfig,
    TrainConfig,
)
from train.distributed import StudentPass, blocks_of
from train.mesa import AveragedStudent
from train.optim import make_optimizer, moments
from train.reparametrise import (
    NoisyWeight,
    Reparametrisation,
    SpectralWeight,
    decompose,
    iterate,
    linear_layers,
    spectral_weight,
)
from train.trainer import Trainer

from .conftest import CPU, Start, newest_state, read_records, same_weights, untimed
from .ranks import on_ranks
from .test_parallel import check_alike
from .test_stages import SECOND, trained

ADAPTORS = (AdaptorConfig(name="clip", summary_dim=24, token_dim=16),)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def tiny(
    config: TrainConfig, student: str = "vit-tiny12", **changes: Any
) -> tuple[RadioModel, Reparametrisation]:
    """A model in training with its reparametrised layers."""
    model = build(ModelConfig(student=student, adaptors=ADAPTORS), 0).train()
    return model, Reparametrisation(model, replace(config, **changes))


@pytest.mark.parametrize(("rows", "columns"), [(8, 5), (5, 8), (1, 4), (4, 1)])
@pytest.mark.parametrize("num", [1, 3])
def test_singular_vectors_against_torch(rows: int, columns: int, num: int) -> None:
    weight = matrix(num * rows, columns)
    s, u, v = decompose(weight, num)
    assert s.shape == (num, 1)
    for index, each in enumerate(weight.chunk(num)):
        sigma = torch.linalg.matrix_norm(each, ord=2)
        assert F.softplus(s[index]) + 0.05 == pytest.approx(float(sigma), rel=1e-5)
        assert float(u[index] @ each @ v[index]) == pytest.approx(float(sigma), rel=1e-5)


def test_power_iteration_finds_the_largest_singular_value_of_each_matrix() -> None:
    weight, u = matrix(3 * 16, 12), F.normalize(matrix(3, 16, seed=1), dim=1)
    for _ in range(200):
        u, v = iterate(weight, u)
    for index, each in enumerate(weight.chunk(3)):
        assert float(u[index] @ each @ v[index]) == pytest.approx(
            float(torch.linalg.matrix_norm(each, ord=2)), rel=1e-5
        )


def test_a_spectral_weight_starts_as_the_weight_and_takes_the_norm_of_s() -> None:
    weight = matrix(12, 8)
    layer = SpectralWeight(weight, 2)
    assert torch.allclose(layer(weight), weight, rtol=1e-6, atol=1e-6)
    layer.advance(weight)  # the start is exact: no later iteration moves it
    assert torch.allclose(layer(weight), weight, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.s.copy_(torch.tensor([[1.0], [-2.0]]))
    for each, s in zip(layer(5 * weight).detach().chunk(2), (1.0, -2.0), strict=True):
        wanted = F.softplus(torch.tensor(s)) + 0.05
        assert float(torch.linalg.matrix_norm(each, ord=2)) == pytest.approx(float(wanted), rel=1e-5)


def test_gradients_of_a_spectral_weight_by_hand() -> None:
    """dW = (g dV - (uv') <dW, V> g / sigma) / sigma for every matrix, and softplus' for s."""
    weight, direction = matrix(6, 4).double().requires_grad_(), matrix(6, 4, seed=1).double()
    s, u, v = (tensor.double() for tensor in decompose(weight.detach(), 2))
    s = (s + 0.3).requires_grad_()
    spectral_weight(weight, s, u, v).backward(direction)
    assert weight.grad is not None and s.grad is not None
    for index in range(2):
        each, flow = weight.detach().chunk(2)[index], direction.chunk(2)[index]
        sigma = u[index] @ each @ v[index]
        gain = F.softplus(s.detach()[index]) + 0.05
        wanted = gain / sigma * (flow - torch.outer(u[index], v[index]) * (flow * each).sum() / sigma)
        assert torch.allclose(weight.grad.chunk(2)[index], wanted)
        slope = (flow * each).sum() / sigma * torch.sigmoid(s.detach()[index])
        assert torch.allclose(s.grad[index], slope)
    assert torch.autograd.gradcheck(lambda w, t: spectral_weight(w, t, u, v), (weight, s))


def test_autocast_leaves_spectral_weights_in_float32() -> None:
    weight = matrix(12, 8)
    layer = SpectralWeight(weight, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(weight), layer(weight).float())
        inside = layer(weight)
    assert torch.equal(inside, layer(weight))


def test_which_layers_are_spectral(config: TrainConfig) -> None:
    model, _ = tiny(config, spectral=True)
    found = {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    assert found == set(linear_layers(model))
    assert {
        "student.blocks.0.attn.qkv",
        "student.blocks.3.mlp.fc2",
        "adaptors.clip.spatial.layers.3",
    } <= found
    assert not any(name.startswith("student.stem") for name in found)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name.endswith(".0.s")}
    assert shapes["student.blocks.0.attn.qkv.parametrizations.weight.0.s"] == (3, 1)
    assert shapes["student.blocks.0.mlp.fc1.parametrizations.weight.0.s"] == (1, 1)
    assert len(shapes) == len(found)
    hybrid = build(ModelConfig(student="e-radio-tiny"), 0)
    assert not any("positions" in name for name in linear_layers(hybrid))
    assert any(name.endswith("attn.qkv") for name in linear_layers(hybrid))


def test_blocks_are_those_of_the_plain_student(config: TrainConfig) -> None:
    def count(model: RadioModel) -> int:
        student = model.student
        assert isinstance(student, nn.Module)
        return len(blocks_of(student))

    for name in ("vit-tiny12", "timm:pvt_v2_b0"):
        plain = build(ModelConfig(student=name), 0)
        expected = count(plain)
        Reparametrisation(plain, replace(config, spectral=True, damp=0.1))
        assert count(plain) == expected


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_folded_weights_give_the_features_of_the_next_forward(config: TrainConfig, damp: float) -> None:
    model, reparametrised = tiny(config, spectral=True, damp=damp)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
            )
    plain = build(ModelConfig(student="vit-tiny12", adaptors=ADAPTORS), 1).eval()
    folded = reparametrised.fold(model.state_dict())
    assert list(folded) == list(plain.state_dict())
    plain.load_state_dict(folded)
    reparametrised.advance(0)
    images = torch.rand(2, 3, 48, 48)
    expected = plain.adapt("clip", plain(images))
    found = model.eval().adapt("clip", model(images))
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_fold_and_unfold_are_inverse(config: TrainConfig, spectral: bool, damp: float) -> None:
    model, reparametrised = tiny(config, spectral=spectral, damp=damp)
    plain = {name: 1.5 * tensor for name, tensor in reparametrised.fold(model.state_dict()).items()}
    learned = dict(model.named_parameters())
    assert learned.keys() <= reparametrised.unfold(plain).keys()
    reparametrised.write(plain, model.state_dict())
    for name, tensor in reparametrised.fold(model.state_dict()).items():
        assert torch.allclose(tensor, plain[name], rtol=1e-5, atol=1e-6), name


def test_noise_has_the_deviation_asked_for_and_is_a_function_of_seed_and_step(config: TrainConfig) -> None:
    model, _ = run = tiny(config, damp=0.1)

    def factors(run: tuple[RadioModel, Reparametrisation], step: int) -> Tensor:
        run[1].advance(step)
        noises = [module for module in run[0].modules() if isinstance(module, NoisyWeight)]
        return torch.cat([noise.factor.flatten() for noise in noises])

    first = factors(run, 0)
    assert float(first.mean()) == pytest.approx(1.0, abs=5e-4)
    assert float(first.std()) == pytest.approx(0.1, rel=5e-3)
    assert not torch.equal(first, factors(run, 1))
    assert torch.equal(first, factors(run, 0))
    assert not any(isinstance(module, NoisyWeight) for module in model.get_submodule("adaptors").modules())
    assert not torch.equal(first, factors(tiny(config, damp=0.1, seed=1), 0))


def test_the_gradient_goes_through_the_noise() -> None:
    layer = nn.Linear(3, 2, bias=False)
    noise = NoisyWeight(layer.weight)
    parametrize.register_parametrization(layer, "weight", noise)
    noise.factor.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    x = torch.tensor([[1.0, 10.0, 100.0]])
    learned = layer.get_parameter("parametrizations.weight.original")
    out = layer(x)
    assert torch.allclose(out, x @ (learned * noise.factor).T)
    out.backward(torch.tensor([[1.0, -1.0]]))
    assert learned.grad is not None
    assert learned.grad.tolist() == [[1.0, 20.0, 300.0], [-4.0, -50.0, -600.0]]
    assert torch.equal(layer.eval()(x), x @ learned.T)


@pytest.mark.parametrize("kind", ["adamw", "muon", "lamb"])
def test_every_optimizer_moves_spectral_weights_and_decays_s(config: TrainConfig, kind: Any) -> None:
    model, _ = tiny(config, spectral=True)
    optimizer = make_optimizer(model, OptimConfig(kind=kind, lr=0.1, weight_decay=0.5))
    weights = dict(model.named_parameters())
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    layer = "student.blocks.0.attn.qkv.parametrizations.weight"
    assert groups[id(weights[f"{layer}.0.s"])]["weight_decay"] == 0.5
    assert groups[id(weights[f"{layer}.original"])]["matrices"] == (kind != "adamw")
    assert not groups[id(weights[f"{layer}.0.s"])]["matrices"]
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name in (f"{layer}.0.s", f"{layer}.original"):
        if kind == "lamb" and name.endswith("original"):  # the decay is inside its scaled direction
            assert bool((weights[name].abs() < before[name].abs()).all())
        else:
            assert torch.allclose(weights[name], before[name] * (1 - 0.1 * 0.5))
    assert f"exp_avg.{layer}.0.s" in moments(optimizer, model)


@pytest.mark.parametrize("kind", ["adamw", "muon", "lamb"])
def test_s_crosses_zero(kind: Any) -> None:
    """Nothing keeps the largest singular value on one side of softplus(0) + 0.05."""
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(0.8 * matrix(4, 6) / torch.linalg.matrix_norm(matrix(4, 6), ord=2))
    parametrize.register_parametrization(layer, "weight", SpectralWeight(layer.weight, 1))
    s = layer.get_parameter("parametrizations.weight.0.s")
    assert s.item() > 0
    optimizer = make_optimizer(layer, OptimConfig(kind=kind, lr=0.05))
    for _ in range(20):
        optimizer.zero_grad()
        layer.weight.square().sum().backward()
        optimizer.step()
    assert s.item() < -0.5


def test_weights_that_are_too_small_and_students_without_linear_layers(config: TrainConfig) -> None:
    model = build(ModelConfig(student="vit-tiny12"), 0)
    with torch.no_grad():
        model.get_parameter("student.blocks.1.mlp.fc1.weight").mul_(1e-3)
    with pytest.raises(ConfigError, match=r"student.blocks.1.mlp.fc1.weight: its largest singular value is"):
        Reparametrisation(model, replace(config, spectral=True))
    convolutions = build(ModelConfig(student="timm:fastvit_t8"), 0)
    with pytest.raises(ConfigError, match=r"--damp changes .* has none"):
        Reparametrisation(convolutions, replace(config, damp=0.1))


@pytest.mark.parametrize("spectral", [False, True])
def test_the_averaged_student_of_mesa_is_the_published_one(config: TrainConfig, spectral: bool) -> None:
    model, reparametrised = tiny(config, spectral=spectral, damp=0.3)
    averages = {name: 1.1 * weight.detach() for name, weight in model.named_parameters()}
    student = model.student
    assert isinstance(student, nn.Module)
    averaged = AveragedStudent(StudentPass(student), averages, lambda: reparametrised.buffers_for(averages))
    with torch.no_grad():
        for name, weight in averages.items():
            if name.endswith("original"):
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    plain = build(ModelConfig(student="vit-tiny12", adaptors=ADAPTORS), 1).eval()
    reparametrised.advance(0)
    plain.load_state_dict(reparametrised.fold({**model.state_dict(), **averages}))
    images = torch.rand(2, 3, 48, 48)
    found = averaged.encode(images, None)
    assert torch.allclose(found.tokens, plain(images).tokens, atol=1e-5)
    noisy = student(images).tokens
    assert torch.equal(noisy, student(images).tokens)  # the student keeps its own buffers
    assert not torch.allclose(noisy, found.tokens, atol=1e-2)


BOTH = {"spectral": True, "damp": 0.05, "ema": 0.8, "mesa": 0.5, "mesa_start": 0.0}


def test_a_run_publishes_plain_weights(config: TrainConfig, start: Start) -> None:
    start(config, steps=2, ema=0.8, out=config.out / "plain").train()
    run = start(config, steps=2, **BOTH, out=config.out / "both")
    run.train()
    for name in ("ckpt.pt", "ckpt-ema.pt"):
        found, plain = (load_checkpoint(config.out / out / name).tensors for out in ("both", "plain"))
        assert {key: tensor.shape for key, tensor in found.items()} == {
            key: tensor.shape for key, tensor in plain.items()
        }
        assert not torch.equal(
            found["student.blocks.0.mlp.fc1.weight"], plain["student.blocks.0.mlp.fc1.weight"]
        )
    # Evaluation of the trainer's own model is that of the file, without noise.
    run.reparametrisation.advance(99)
    images = torch.rand(2, 3, 48, 48)
    saved = load(config.out / "both" / "ckpt.pt")
    assert torch.allclose(run.model.eval()(images).tokens, saved(images).tokens, atol=1e-5)


def test_a_run_starts_where_a_plain_one_does(config: TrainConfig, start: Start) -> None:
    for name, spectral in (("plain", False), ("spectral", True)):
        start(config, steps=1, spectral=spectral, out=config.out / name).train()
    losses = [read_records(config.out / name)[0]["loss"] for name in ("plain", "spectral")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_stopped_run_goes_on_exactly(config: TrainConfig, start: Start) -> None:
    changes = {"steps": 4, "save_every": 2, **BOTH}
    start(config, **changes, out=config.out / "whole").train()
    run = start(config, **changes, out=config.out / "parts")
    run.stop._requested = False
    genuine = run.train_step

    def stopping(batch: Any) -> Tensor:
        run.stop._requested = run.step == 2
        return genuine(batch)

    run.train_step = stopping  # type: ignore[method-assign]
    run.train()
    assert run.stopped
    start(config, **changes, out=config.out / "parts").train()
    assert same_weights(config.out / "whole", config.out / "parts")
    assert untimed(config.out / "whole") == untimed(config.out / "parts")
    assert any(name.endswith("parametrizations.weight.0.u") for name in newest_state(config.out / "parts"))
    averages = [load_checkpoint(config.out / out / "ckpt-ema.pt").tensors for out in ("whole", "parts")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    # Published again from the state, the checkpoint is the same.
    (config.out / "parts" / "ckpt-ema.pt").unlink()
    start(config, **changes, out=config.out / "parts").train()
    again = load_checkpoint(config.out / "parts" / "ckpt-ema.pt").tensors
    assert all(torch.equal(averages[0][name], again[name]) for name in again)


@pytest.mark.slow
def test_stages_go_on_from_plain_weights(config: TrainConfig, tmp_path: Path) -> None:
    staged = replace(
        config,
        steps=3,
        stages=(replace(SECOND, steps=3),),
        normalise=NormaliseConfig(kind="phi-s", steps=1),
        save_every=2,
        **BOTH,
    )
    trained(staged, tmp_path / "whole")
    trained(staged, tmp_path / "parts", stop=5)
    trained(staged, tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    records = read_records(tmp_path / "whole")
    assert records[3]["clip/unexplained"] == pytest.approx(records[2]["clip/unexplained"], rel=0.2)


def test_small_heads_go_on_as_they_are(config: TrainConfig, tmp_path: Path) -> None:
    """Tokens that deviate by 0.03 have heads below the least singular value; without a rate they stay."""
    small = replace(
        config,
        teachers=(TeacherConfig(name="clip", model="scenes:clip-scaled"),),
        steps=1,
        optim=OptimConfig(lr=0.0),
        normalise=NormaliseConfig(kind="phi-s", steps=1),
        spectral=True,
        ema=0.5,
    )
    trained(small, tmp_path / "first")
    trained(replace(small, stages=(StageConfig(steps=1),)), tmp_path / "staged")
    head = "adaptors.clip.spatial.layers.3.weight"
    for name in ("ckpt.pt", "ckpt-ema.pt"):
        first, found = (load_checkpoint(tmp_path / out / name).tensors for out in ("first", "staged"))
        assert float(torch.linalg.matrix_norm(first[head], ord=2)) < 0.05
        for key, tensor in first.items():
            assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-6), key


def test_only_weights_that_are_still_to_be_written_may_be_too_small(config: TrainConfig) -> None:
    name = "student.blocks.1.mlp.fc1"
    model = build(ModelConfig(student="vit-tiny12"), 0)
    weight = model.get_parameter(f"{name}.weight").detach().clone()
    small = {f"{name}.weight": 1e-3 * weight}
    model.load_state_dict(small, strict=False)
    reparametrised = Reparametrisation(model, replace(config, spectral=True), [name])
    learned = dict(model.named_parameters())
    assert torch.equal(reparametrised.at_start(learned)[f"{name}.weight"], small[f"{name}.weight"])
    assert torch.equal(
        reparametrised.unfold(small)[f"{name}.parametrizations.weight.original"], 1e-3 * weight
    )
    with pytest.raises(ConfigError, match=f"{name}.weight: its largest singular value is"):
        reparametrised.write(small, learned)
    reparametrised.write({f"{name}.weight": weight}, learned)
    assert torch.allclose(model.get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6)


def test_parts_of_a_step_do_not_change_it(config: TrainConfig, start: Start) -> None:
    changes = {"steps": 2, "optim": OptimConfig(lr=1e-4), **BOTH}
    start(config, **changes, out=config.out / "whole").train()
    start(config, **changes, grad_accum_steps=2, out=config.out / "parts").train()
    recomputed = StudentOptions(activation_checkpointing=True)
    start(config, **changes, options=recomputed, out=config.out / "recomputed").train()
    check_alike(config.out / "whole", config.out / "parts")
    check_alike(config.out / "whole", config.out / "recomputed")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_train_as_one_does(config: TrainConfig, start: Start, tmp_path: Path, parallel: Any) -> None:
    changes = {"steps": 2, "optim": OptimConfig(kind="lamb", lr=1e-3), **BOTH}
    if parallel == "fsdp":
        changes |= {"mesa": 0.0, "mesa_start": MESA_START}
    start(config, **changes, out=tmp_path / "one").train()
    many = replace(config, **changes, parallel=parallel, out=tmp_path / "two")

    def work(ranks: Any) -> None:
        Trainer(many, ranks, CPU, Console(quiet=True)).train()

    on_ranks(2, tmp_path / "ranks", work)
    check_alike(tmp_path / "one", tmp_path / "two")


@torch.no_grad()
def test_a_compiled_block_has_the_same_weights(config: TrainConfig) -> None:
    model, reparametrised = tiny(config, spectral=True, damp=0.1)
    reparametrised.advance(0)
    block: Any = model.get_submodule("student.blocks.0")
    x = torch.rand(2, 5, 128)
    expected = block(x)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    reparametrised.advance(1)  # new noise reaches the compiled block
    assert torch.allclose(compiled(x), block(x), atol=1e-5)
    assert not torch.allclose(compiled(x), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile
def test_a_compiled_student_trains_alike(config: TrainConfig, start: Start) -> None:
    changes = {"steps": 2, "optim": OptimConfig(lr=1e-4), **BOTH}
    for name, compiled in (("plain", False), ("compiled", True)):
        start(config, **changes, compile=compiled, out=config.out / name).train()
    check_alike(config.out / "plain", config.out / "compiled")
