"""What a machine without GPUs or libraries is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from radio.errors import ConfigError

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "gpu.py"


def run(*words: str, stop: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in the project's root; a library named by `stop` is not to be found."""
    code = f"import importlib.util as u, runpy, sys; find = u.find_spec; sys.argv = {list(words)!r}\n"
    code += f"u.find_spec = lambda name, *rest: None if name == {stop!r} else find(name, *rest)\n"
    code += "runpy.run_module('pytest', run_name='__main__')" if words[0] == "pytest" else ""
    code += f"runpy.run_path({words[0]!r}, run_name='__main__')" if words[0] != "pytest" else ""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


GPU_TESTS = ("pytest", "-c", "tests/gpu/gpu.ini", "--rootdir", ".", "tests/gpu")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_all_of_them_skip_for_one_reason() -> None:
    done = run(*GPU_TESTS)
    assert done.returncode == 0, done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))
    assert line.endswith(f"torch {torch.__version__} sees no GPU")


@pytest.mark.slow
def test_without_a_library_they_skip_by_its_name() -> None:
    done = run(*GPU_TESTS, stop="pydantic")
    assert done.returncode in (0, 5), done.stdout
    assert "pydantic is not installed" in done.stdout
    assert "error" not in done.stdout.lower()


@pytest.fixture
def benchmark() -> Any:
    """The benchmark's module, which is in no package."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_asks_for_a_gpu(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(ConfigError, match="sees no GPU; start this where there is one, or see that it works"):
        benchmark.main()


def test_the_benchmark_takes_the_papers_shares(benchmark: Any) -> None:
    config = benchmark.recipes["paper-h14"]()
    groups = benchmark.make_partition(config, 64).groups
    runs = [benchmark.one_rank(config, group, group.share) for group in groups]
    assert [run.batch_size for run in runs] == [32, 4]
    assert [[t.name for t in run.teachers] for run in runs] == [["clip", "dino"], ["sam"]]
    assert runs[1].teachers[0].student_resolution == 1008


@pytest.mark.slow
def test_the_benchmarks_table_in_small() -> None:
    done = run(str(BENCHMARK), "--device", "cpu", "--tiny", "--steps", "1", "--peak-tflops", "1")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    head, _, *body = rows
    assert [row[:2] for row in body] == [
        ["paper-b14", "clip+dino"],
        ["paper-h14", "clip+dino"],
        ["paper-h14", "sam"],
    ]
    for row in body:
        found = dict(zip(head, row, strict=True))
        images, seconds, speed = (float(found[name]) for name in ("images", "s/step", "TFLOP/s"))
        assert float(found["images/s"]) == pytest.approx(images / seconds, rel=0.01)
        assert float(found["MFU"].rstrip("%")) == pytest.approx(100 * speed, abs=0.06)
        assert float(found["GB planned"]) > 0
