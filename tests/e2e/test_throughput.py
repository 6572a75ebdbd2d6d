"""The efficient backbones against the ViT that they replace, as the README has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.core.report import read
from radio import entry


@pytest.mark.slow
def test_e_radio_is_as_much_faster_than_vit_h14_as_in_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ["e-radio-l", "e-radio-b", "vit-h14"]
    settings = [
        "--reference",
        "vit-h14",
        "--threads",
        "1",
        "--batches",
        "1",
        "4",
        "--device",
        "cpu",
        "--plain",
    ]
    assert entry.evaluate(["throughput", *models, *settings]) == 0
    ratios, gmacs = {}, {}
    for model in models:
        report = read(Path("reports") / f"throughput-{model}.json")
        assert report.settings["resolved"]["measured_together"] == models
        assert report.seconds["total"] < 15 * 60
        ratios[model] = report.metrics["images_per_second"].value
        gmacs[model] = report.metrics["gmacs"].value
    # The paper, on a GPU: 3472 / 556 = 6.2 and 6422 / 556 = 11.6.
    assert ratios["e-radio-l"] / ratios["vit-h14"] > 6
    assert ratios["e-radio-b"] / ratios["vit-h14"] > 11
    assert gmacs == {
        name: pytest.approx(value, rel=0.02)
        for name, value in zip(models, (23.45, 10.54, 167.3), strict=True)
    }
