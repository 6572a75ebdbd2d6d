"""Every evaluator scores on a GPU as on a CPU, within what the kernels' rounding can turn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

SMALL = {
    "knn": (("faiss",), ["--scenes", "400", "200"], 2.0),
    "zeroshot": (("open_clip",), ["--scenes", "200"], 2.0),
    "sam": (("segment_anything", "pycocotools"), ["--scenes", "20"], 2.0),
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
    from evals.core.report import read
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


def test_the_index_searches_on_the_gpu_what_it_finds_on_the_cpu(gpu: torch.device) -> None:
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has no GPU side; install faiss-gpu")
    from evals.knn.index import Index

    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(5000, 64, generator=generator), torch.randn(50, 64, generator=generator)
    found = Index(bank, torch.arange(5000)).search(queries, 10)
    unit = torch.nn.functional.normalize
    exact = (unit(queries.double(), dim=1) @ unit(bank.double(), dim=1).T).topk(10, dim=1)
    assert torch.equal(found.ids, exact.indices)
    assert torch.allclose(found.similarities.double(), exact.values, atol=1e-5)
