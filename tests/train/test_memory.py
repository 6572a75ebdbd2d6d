"""What cannot fit is refused with the numbers, before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radio import entry, resources
from radio.config import write_yaml
from radio.model import build
from train.config import AdaptorOptions, TrainConfig
from train.setup import TeacherFacts, check_memory, make_partition, model_config

FACTS = {name: TeacherFacts("", {48: (48, 48)}, 12, 24, 16) for name in ("clip", "dense", "sam")}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_weights_gradients_moments_and_images_are_counted(config: TrainConfig, ema: float) -> None:
    chosen = replace(config, ema=ema)
    described = model_config(chosen, FACTS)
    built = build(described, 0)
    parameters = list(built.parameters())
    held = [*parameters, *parameters, *parameters, *parameters, *(parameters if ema else [])]
    images = torch.zeros(chosen.batch_size, 3, chosen.resolution, chosen.resolution)
    need = sum(tensor.nbytes for tensor in (*held, images))
    partition = make_partition(chosen, 1)
    check_memory(chosen, described, partition, 0, need)
    with pytest.raises(
        ValueError, match=r"a rank needs .* GB for the student's weights, gradients and moments"
    ):
        check_memory(chosen, described, partition, 0, need - 1)


@pytest.mark.parametrize(
    "student",
    ["vit-tiny12", "e-radio-tiny", "timm:resnet18", "timm:efficientnetv2_rw_t", "timm:maxvit_tiny_rw_224"],
)
def test_every_family_of_students_can_be_counted(config: TrainConfig, student: str) -> None:
    chosen = replace(config, student=student, resolution=224)
    with pytest.raises(ValueError, match="a rank needs"):
        check_memory(chosen, model_config(chosen, FACTS), make_partition(chosen, 1), 0, 0)


@pytest.mark.parametrize(
    ("text", "ranks", "part"),
    [("max\n", "", 1), ("4096\n", "", None), ("x", "4", 4), ("", "0", 1), ("1" * 30, "no", 1)],
)
def test_a_container_and_other_ranks_leave_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, ranks: str, part: int | None
) -> None:
    monkeypatch.setattr(resources, "_CONTROL_GROUP", tmp_path / "absent")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = resources.memory_of(torch.device("cpu"))
    limit = tmp_path / "memory.max"
    limit.write_text(text)
    monkeypatch.setattr(resources, "_CONTROL_GROUP", limit)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert resources.memory_of(torch.device("cpu")) == (whole // part if part else 4096)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1 << 20, "resolution": 4092}, {"adaptor": AdaptorOptions(hidden=65_536)}]
)
def test_a_run_that_cannot_fit_is_refused_before_it_begins(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], tmp_path: Path
) -> None:
    monkeypatch.setattr(resources, "_allowed", lambda whole: 100 * 10**6)
    write_yaml(replace(config, **changes), tmp_path / "a.yaml")  # type: ignore[arg-type]
    assert entry.train([str(tmp_path / "a.yaml")]) == 2
    assert not config.out.exists()
