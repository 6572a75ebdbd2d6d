"""Every evaluator scores on a GPU as on a CPU, within what the kernels' rounding can turn."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.core.report import Report, read

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu

SMALL = {
    "knn": (("faiss",), ["--scenes", "400", "200"], 2.0),
    "linear": ((), ["--scenes", "400", "200", "100"], 4.0),
    "zeroshot": (("open_clip",), ["--scenes", "200"], 2.0),
    "maps": ((), ["--num-images", "4"], 2.0),
    "retrieval": ((), ["--scenes", "60", "60"], 2.0),
    "correspondence": ((), ["--scenes", "40"], 2.0),
    "resolution": (("faiss",), ["--sides", "96", "144", "--knn.scenes", "400", "200"], 5.0),
    "sam": (("segment_anything", "pycocotools"), ["--scenes", "20"], 2.0),
    "depth": ((), ["--scenes", "60", "20", "--iterations", "20"], 5.0),
    "seg": (("mmseg", "mmcv", "cv2"), ["--scenes", "60", "20", "--iterations", "20"], 5.0),
    "vqa": (("transformers", "accelerate"), ["--scenes", "40", "20", "--max-steps", "6"], 10.0),
}
MODELS = {"sam": "scenes:sam", "zeroshot": "scenes:clip"}


@pytest.mark.parametrize("task", SMALL)
def test_scores_are_the_cpus(task: str, gpu: torch.device, tmp_path: Path) -> None:
    libraries, options, tolerance = SMALL[task]
    for library in (*libraries, "tyro"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    from radio.entry import evaluate

    model = [MODELS[task]] if task in MODELS else ["vit-tiny12", "--random-init"]
    scores = []
    for device in ("cpu", str(gpu)):
        out = tmp_path / device
        words = [task, *model, *options, "--device", device, "--out", str(out)]
        assert evaluate([*words, "--cache", str(tmp_path / f"cache-{device}"), "--plain"]) == 0
        (path,) = out.glob("*.json")
        scores.append({name: m.value for name, m in read(path).metrics.items() if not m.unit.endswith("/s")})
    here, there = scores
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert there[name] == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize("sharded", [True, False])
def test_ranks_on_two_gpus_train_llava_as_one_process_does(sharded: bool, tmp_path: Path) -> None:
    """FSDP2 and DDP over NCCL, each rank on its own GPU: two on one are refused by NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 GPUs are wanted, and there are {torch.cuda.device_count()}")
    for library in ("transformers", "accelerate", "tyro"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    one, two = as_one_and_as_two("cuda", ["--fsdp"] if sharded else [], tmp_path)
    assert two.settings["resolved"]["ranks"] == 2
    for loss in ("words_loss", "pretrain_loss", "instruct_loss"):
        assert two.metrics[loss].value == pytest.approx(one.metrics[loss].value, abs=1e-2)
    assert one.metrics.keys() == two.metrics.keys()
    assert two.metrics["accuracy"].value == pytest.approx(one.metrics["accuracy"].value, abs=10)


def as_one_and_as_two(device: str, flags: list[str], tmp_path: Path) -> list[Report]:
    """The reports of `radio-eval vqa` alone, and with some flags on two ranks."""
    ranks = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")]
    program = [sys.executable, "-c", "import sys; from radio.entry import evaluate; sys.exit(evaluate())"]
    reports = []
    for name, start, more in (("one", [], []), ("two", [sys.executable, *ranks], flags)):
        words = [*start, *program, "vqa", "vit-tiny12", "--random-init", "--device", device, *more, "--plain"]
        words += ["--scenes", "24", "12", "--max-steps", "3", "--train-batch-size", "8", "--micro-batch", "4"]
        words += ["--cache", str(tmp_path / f"cache-{name}"), "--out", str(tmp_path / name)]
        env = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
        done = subprocess.run(
            words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = (tmp_path / name).glob("*.json")
        reports.append(read(path))
    return reports


def test_faiss_finds_on_the_gpu_the_neighbours_of_the_cpu(gpu: torch.device) -> None:
    """With every vector twice in the bank: the lower id comes first."""
    pytest.importorskip("faiss")
    from evals.knn.index import Index, load_faiss

    if not getattr(load_faiss(), "get_num_gpus", int)():
        pytest.skip("this FAISS uses no GPU; install faiss-gpu")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(5000, 256, generator=generator).repeat(2, 1)
    queries = torch.randn(300, 256, generator=generator)
    ids = torch.arange(len(bank))
    index = Index(bank, ids, gpu)
    assert index._on_gpu is not None
    found, wanted = index.search(queries, 20), Index(bank, ids).search(queries, 20)
    assert torch.equal(found.ids, wanted.ids)
    unit = torch.nn.functional.normalize
    exact = (unit(queries).double() @ unit(bank).double().T).mul(1e10).round().div(1e10)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.ids, order[:, :20])
    assert torch.allclose(found.similarities.double(), values[:, :20], rtol=0, atol=1e-5)
