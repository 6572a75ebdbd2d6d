"""The nightly gate on reports of real probes: luck passes, a lost model does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from radio import entry

SMALL = ["--scenes", "60", "40", "--iterations", "40", "--plain"]


@pytest.mark.slow
def test_two_seeds_pass_within_the_measured_noise_and_random_weights_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ["--cache", "cache"]
    for folder, model, seed in (
        ("main", "scenes:dense", "0"),
        ("night", "scenes:dense", "1"),
        ("lost", "arch:vit-tiny12", "0"),
    ):
        assert entry.evaluate(["seg", model, "--out", folder, "--head-seed", seed, *SMALL, *cache]) == 0
    probe = ["--seg.scenes", "60", "40", "--seg.iterations", "40", "--cache", "cache"]
    command = [
        "noise",
        "scenes:dense",
        "--tasks",
        "seg",
        "--repeats",
        "4",
        "--out",
        "main",
        "--plain",
        *probe,
    ]
    assert entry.evaluate(command) == 0
    gate = ["--baseline", "main", "--tolerance", "0", "--fail-on-regression", "--plain"]
    assert entry.evaluate(["compare", "night", *gate]) == 0
    assert entry.evaluate(["compare", "main", "--noise", "main/noise.json", *gate]) == 0
    capsys.readouterr()
    assert entry.evaluate(["compare", "lost", *gate]) == 1
    assert "the noise: seg miou" in capsys.readouterr().out
