"""What cannot fit is refused with the numbers, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from radio import entry
from radio.errors import SizeError
from radio.hub import load_backbone
from radio.resources import check_memory
from radio.students import students

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["vit-tiny12", "e-radio-tiny", "timm:resnet18", "scenes:clip"])
def test_what_is_counted_is_there_at_the_end_of_a_forward(
    monkeypatch: pytest.MonkeyPatch, spec: str, dtype: torch.dtype
) -> None:
    model = load_backbone(spec, random_init=spec in students).to(CPU, dtype)
    size = model.nearest_size(100, 130)
    images = torch.zeros(2, 3, *size, dtype=dtype)
    with torch.inference_mode():
        tokens = model(images).tokens
    monkeypatch.setattr("radio.resources.memory_of", lambda device: images.nbytes + tokens.nbytes)
    check_memory(model, 2, size, CPU, dtype)
    monkeypatch.setattr("radio.resources.memory_of", lambda device: images.nbytes)
    said = f"^2 images of {size[0]}x{size[1]} px and their tokens take .* GB, and cpu"
    with pytest.raises(SizeError, match=said):
        check_memory(model, 2, size, CPU, dtype)


@pytest.mark.parametrize(
    ("command", "images"),
    [
        (["knn", "--size", "6000", "--bank", "scenes:val", "--leave-one-out", "--scenes", "60", "60"], 60),
        (["knn", "--batch-size", "65536", "--size", "3000", "--scenes", "600", "600"], 512),
        (["throughput", "--resolution", "6000", "--batches", "1", "64"], 64),
        (["sam", "--size", "112", "--scenes", "8"], 4),
        (["seg", "--preset", "paper", "--crop", "6000", "--scenes", "4", "4"], 16),
    ],
)
def test_a_size_that_no_machine_has_room_for_is_told_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    images: int,
) -> None:
    monkeypatch.setattr("radio.resources.memory_of", lambda device: 10**5 if command[0] == "sam" else 10**9)
    model = ["scenes:sam"] if command[0] == "sam" else ["vit-tiny12"]
    model += ["--random-init"] if command[0] in ("knn", "seg") else []
    cached = ["--cache", str(tmp_path)] if command[0] != "throughput" else []
    assert entry.evaluate([command[0], *model, *command[1:], *cached, "--plain", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {images} images of ")
    assert said.endswith("make the images or the batch smaller\n")
    assert not list(tmp_path.glob("features/*"))
