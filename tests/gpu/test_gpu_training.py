"""A run on a GPU does what it does on a CPU, within the kernels' rounding."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from radio import checkpoint
from radio.config import write_yaml
from radio.dist import Ranks
from radio.hub import load_teacher
from radio.nn.vit import CroppedPositions, draw_crops
from train.config import BalanceConfig, DataConfig, LossConfig, OptimConfig, TeacherConfig, TrainConfig
from train.data.loader import prefetch
from train.monitor import PhaseTimer
from train.setup import halve
from train.trainer import Trainer

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
START = Path(__file__).with_name("start.py")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Four steps on the generated world, in float32."""
    return TrainConfig(
        recipe="gpu",
        student="vit-tiny12",
        teachers=(TeacherConfig(name="dense", model="scenes:dense"),),
        resolution=96,
        steps=4,
        batch_size=8,
        out=tmp_path / "run",
        data=DataConfig(scenes=64, workers=0),
        optim=OptimConfig(lr=1e-3),
        precision="fp32",
        log_every=1,
        save_every=2,
    )


def begin(config: TrainConfig, device: torch.device, **changes: Any) -> Trainer:
    """Set a run up on a device."""
    named = replace(config, device=device.type, **changes)
    return Trainer(named, Ranks(), device, Console(file=io.StringIO()))


def gradients(run: Trainer) -> tuple[dict[str, Tensor], float]:
    """The gradients and the loss of a run's first step, on the CPU."""
    _, total, _ = run.compute_gradients(next(run.batches()))
    found = {n: p.grad.cpu() for n, p in run.model.named_parameters() if p.grad is not None}
    return found, float(total)


def losses(run: Trainer) -> list[float]:
    """Train, and read the loss of each step."""
    run.train()
    lines = (run.config.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(out: Path) -> dict[str, Tensor]:
    """The tensors of a run's checkpoint."""
    return checkpoint.load(out / "ckpt.pt").tensors


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Hold every tensor to a share of the other's largest value."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        limit = tolerance * max(float(other[name].abs().max()), 1e-3)
        assert float((tensor - other[name]).abs().max()) <= limit, name


@pytest.mark.parametrize("student", ["vit-tiny12", "vitdet-tiny12", "e-radio-tiny"])
def test_the_gradients_of_a_step_are_the_cpus(config: TrainConfig, gpu: torch.device, student: str) -> None:
    named = replace(config, student=student)
    (here, loss), (there, other) = (gradients(begin(named, device)) for device in (CPU, gpu))
    assert loss == pytest.approx(other, rel=1e-4)
    close(there, here, 2e-3)


def test_losses_in_bfloat16_are_near(config: TrainConfig, gpu: torch.device, tmp_path: Path) -> None:
    whole = losses(begin(config, gpu))
    half = losses(begin(config, gpu, precision="bf16", out=tmp_path / "half"))
    assert half == pytest.approx(whole, rel=0.03)


def test_compiled_blocks_learn_the_same(config: TrainConfig, gpu: torch.device, tmp_path: Path) -> None:
    plain = losses(begin(config, gpu))
    assert losses(begin(config, gpu, compile=True, out=tmp_path / "compiled")) == pytest.approx(
        plain, rel=1e-3
    )


def test_a_run_goes_on_where_it_was_stopped(config: TrainConfig, gpu: torch.device, tmp_path: Path) -> None:
    begin(config, gpu).train()
    stopped = replace(config, out=tmp_path / "stopped")
    run = begin(stopped, gpu)
    for batch in run.batches():
        run.train_step(batch)
        run.step += 1
        if run.step == 2:
            break
    run.save()
    run.states.wait(last=True)
    begin(stopped, gpu).train()
    close(weights(stopped.out), weights(config.out), 1e-3)


@pytest.mark.parametrize("prefetch_teachers", [False, True])
def test_teachers_ahead_change_nothing(
    config: TrainConfig, gpu: torch.device, tmp_path: Path, prefetch_teachers: bool
) -> None:
    begin(config, gpu).train()
    begin(config, gpu, prefetch_teachers=prefetch_teachers, out=tmp_path / "other").train()
    close(weights(tmp_path / "other"), weights(config.out), 1e-3)


def test_the_prefetch_thread_has_its_device_and_stream(gpu: torch.device) -> None:
    main = torch.cuda.current_stream(gpu)
    caller = threading.get_ident()

    def items() -> Iterator[Tensor]:
        for number in range(3):
            assert threading.get_ident() != caller
            assert torch.cuda.current_device() == gpu.index
            assert torch.cuda.current_stream(gpu) != main
            big = torch.full((2048, 2048), float(number), device=gpu)
            yield big @ big

    for number, item in enumerate(prefetch(items(), gpu)):
        assert float(item[0, 0]) == 2048 * number**2


def test_streams_overlap_and_no_moment_counts_twice(gpu: torch.device) -> None:
    watch, side = PhaseTimer(gpu), torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    start = time.perf_counter()
    with torch.cuda.stream(side), watch.time("teachers", "dense"):
        torch.cuda._sleep(200_000_000)
    with watch.time("forward", "dense"):
        torch.cuda._sleep(200_000_000)
    torch.cuda.synchronize(gpu)
    wall = time.perf_counter() - start
    times = watch.read(1)
    both = times.phases["teachers"] + times.phases["forward"]
    assert times.groups["dense"] <= wall
    assert times.groups["dense"] < 0.8 * both


def test_halved_teachers_say_the_same(gpu: torch.device) -> None:
    whole = load_teacher("scenes:dense").to(gpu, torch.float32)
    halved = copy.deepcopy(whole)
    assert isinstance(halved, torch.nn.Module)
    halve(halved)
    images = torch.rand(2, 3, *whole.native_size, device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        one, other = whole(images), halved(images)
    assert torch.allclose(one.tokens, other.tokens, rtol=0, atol=1e-3)
    assert torch.allclose(one.summary, other.summary, rtol=0, atol=1e-3)


def test_batches_come_from_pinned_memory(config: TrainConfig, gpu: torch.device) -> None:
    from train.data import loader

    seen: list[bool] = []
    to_images = loader.to_images

    def look(pixels: Tensor, device: torch.device) -> Tensor:
        seen.append(pixels.is_pinned())
        return to_images(pixels, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "to_images", look)
        workers = replace(config, data=replace(config.data, workers=1))
        next(begin(workers, gpu).batches())
    assert seen and all(seen)


@pytest.mark.parametrize("width", [128, 1024, 1280])
def test_position_crops_are_the_cpus(gpu: torch.device, width: int) -> None:
    """At every width, and on a tall stack of crops."""
    torch.manual_seed(0)
    positions = CroppedPositions(width, 75)
    crops = draw_crops(64, torch.Generator().manual_seed(1))
    grads = []
    for device in (CPU, gpu):
        table = positions.to(device).table
        table.grad = None
        found = positions((16, 16), crops.to(device))
        found.square().sum().backward()
        assert table.grad is not None
        grads.append((found.detach().cpu(), table.grad.cpu()))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"balance": BalanceConfig(kind="adaloss")},
        {"loss": LossConfig(summary="angle", dispersion="running")},
    ],
)
def test_a_step_waits_for_nothing(config: TrainConfig, gpu: torch.device, changes: dict[str, Any]) -> None:
    run = begin(config, gpu, data=replace(config.data, workers=1), **changes)
    batches = run.batches()
    run.train_step(next(batches))
    batch = next(batches)
    torch.cuda.synchronize(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_as_planned(gpu: torch.device) -> None:
    bench = benchmark()
    config = replace(bench.recipes["paper-b14"](), device="cuda", steps=8)
    (group,) = bench.make_partition(config, 64).groups
    found = bench.measure(bench.one_rank(config, group, group.share), gpu, 3)
    assert found.peak == pytest.approx(found.planned, rel=0.25)


def benchmark() -> Any:
    """The benchmark's module, which is in no package."""
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ranks_on_gpus_learn_what_one_does(
    config: TrainConfig, gpu: torch.device, tmp_path: Path, engine: str, count: int
) -> None:
    if count > torch.cuda.device_count():
        pytest.skip(f"{count} GPUs are wanted, and there are {torch.cuda.device_count()}")
    begin(config, gpu).train()
    shared = replace(config, parallel=engine, device="cuda", out=tmp_path / "shared")
    write_yaml(shared, tmp_path / "settings.yaml")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*words, str(START), str(tmp_path / "settings.yaml")],
        cwd=START.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    close(weights(shared.out), weights(config.out), 1e-2)


def test_the_norms_of_ranks_meet(gpu: torch.device) -> None:
    """One rank's synchronised norm is the plain one; NCCL runs the collective."""
    from train.distributed import Peers, synchronise_norms

    x = torch.rand(4, 3, 8, 8, device=gpu)
    plain = torch.nn.BatchNorm2d(3).to(gpu)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).to(gpu)
    synchronise_norms(network, Peers((0, 1), 2, None, (0,)))
    assert torch.allclose(
        network.eval()(x), F.batch_norm(x, plain.running_mean, plain.running_var), atol=1e-4
    )
