"""`radio-train`: recipes, options over them, and one clear line with exit code 2 for what cannot be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from radio import entry
from radio.config import read_yaml, write_yaml
from radio.errors import RadioError
from radio.students import ViTOptions
from train.cli import main
from train.config import TrainConfig
from train.recipes import recipes
from train.teacher_cache import CacheJob

from .conftest import fill_folder, losses_of, read_records

TINY = [
    *(
        "--teachers.0.model",
        "tiny:clip",
        "--teachers.1.model",
        "tiny:dense",
        "--teachers.2.model",
        "tiny:sam",
        "--teachers.2.batch-size",
        "2",
    ),
    *("--resolution", "48", "--steps", "2", "--batch-size", "2", "--device", "cpu"),
    *("--data.scenes", "50", "--data.workers", "0"),
]


def test_a_recipe_with_options_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = [
        "--optim.lr",
        "0.0003",
        "--data.crop-scale",
        "0.5",
        "1",
        "--loss.smooth-l1-beta",
        "2",
        "--loss.summary",
        "smooth-l1",
        "--out",
        str(out),
    ]
    more = [
        "--student.no-cpe",
        "--summary",
        "mean",
        "--windows",
        "7",
        "8",
        "--adaptor.resample",
        "after",
        "--optim.betas",
        "0.8",
        "0.9",
    ]
    assert main(["smoke", *TINY, *options, *more]) == 0
    written = read_yaml(TrainConfig, out / "config.yaml")
    recipe = recipes["smoke"]()
    wanted = replace(
        recipe,
        options=ViTOptions(cpe=False),
        teachers=tuple(
            replace(t, model=f"tiny:{n}", batch_size=2 if n == "sam" else None)
            for t, n in zip(recipe.teachers, ("clip", "dense", "sam"), strict=True)
        ),
        resolution=48,
        steps=2,
        batch_size=2,
        device="cpu",
        out=out,
        summary="mean",
        windows=(7, 8),
        data=replace(recipe.data, scenes=50, workers=0, crop_scale=(0.5, 1.0)),
        loss=replace(recipe.loss, summary="smooth-l1", smooth_l1_beta=2.0),
        adaptor=replace(recipe.adaptor, resample="after"),
        optim=replace(recipe.optim, lr=3e-4, betas=(0.8, 0.9)),
    )
    assert written == wanted
    said = capsys.readouterr().out
    assert "smoke 2/2  loss " in said
    assert "clip 0." in said or "clip 1." in said
    assert f"checkpoint: {out / 'ckpt.pt'}" in said


def test_a_settings_file_in_the_place_of_a_recipe(config: TrainConfig, tmp_path: Path) -> None:
    write_yaml(replace(config, steps=3), tmp_path / "mine.yaml")
    assert main([str(tmp_path / "mine.yaml")]) == 0
    again = tmp_path / "again"
    assert main([str(config.out / "config.yaml"), "--out", str(again)]) == 0
    assert losses_of(again) == losses_of(config.out)
    assert main([str(config.out / "config.yaml"), "--steps", "2", "--restart"]) == 0
    assert len(read_records(config.out)) == 2


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that ends with 2."""
    assert entry.train(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smok"], "unknown recipe 'smok'; did you mean smoke"),
        (["--steps", "3"], "the first word is a recipe or a config.yaml, got '--steps'"),
        (["absent.yaml"], "absent.yaml: no such settings file"),
        (["smoke", *TINY, "--student", "vit-tiny21"], "unknown student 'vit-tiny21'; did you mean"),
        (
            ["smoke", *TINY, "--resolution", "50"],
            "cannot take 50x50 px; the nearest size that it can is 48x48",
        ),
        (["smoke", *TINY, "--teachers.1.resolution", "70"], "the nearest size that it can is 64x64"),
        (["smoke", *TINY, "--teachers.0.model", "tinny:clip"], "unknown teacher 'tinny'; did you mean tiny"),
        (["smoke", *TINY, "--teachers.0.name", "sam"], "a run needs teachers with names of their own"),
        (["smoke", "--plan", "--teachers.0.name", "sam"], "a run needs teachers with names of their own"),
        (["smoke", *TINY, "--data.scenes", "0"], "no data: give --data.shards"),
        (["smoke", *TINY, "--data.images", "absent"], "absent: no such folder"),
        (["smoke", *TINY, "--log-every", "0"], "--log-every: 0 is out of bounds"),
        (["smoke", *TINY, "--student.registers", "-1"], "--student.registers: -1 is out of bounds"),
        (["paper-h14"], "weights/metaclip_h14.pt: no such"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(words, capsys)
    assert not (tmp_path / "runs").exists()


def test_broken_images_alone_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill_folder(tmp_path / "broken", 0, broken=3)
    words = [
        "smoke",
        *TINY,
        "--data.scenes",
        "0",
        "--data.images",
        str(folder),
        "--out",
        str(tmp_path / "run"),
    ]
    assert "20 images in a row cannot be read" in refused(words, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 3}", "unknown setting 'optim.lrr'; did you mean lr"),
        ("recipe: x", "missing setting 'student'; give it a value"),
        ("steps: many", "steps: wanted int, got 'many'"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_bad_settings_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refused([str(tmp_path / "bad.yaml")], capsys)


@pytest.mark.parametrize(
    ("option", "meant"),
    [("--optim.lrr", "--optim.lr"), ("--data.flipp", "--data.flip"), ("--studnt", "--student")],
)
def test_an_unknown_option_offers_the_nearest(
    option: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.train(["smoke", option, "3"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert option in said
    assert meant in said.replace(option, "")


@pytest.mark.parametrize("words", [["--steps", "some"], ["--summary", "tokens"], ["--precision", "fp8"]])
def test_a_value_of_the_wrong_kind(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.train(["smoke", *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["smoke", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in (
        "--optim.lr",
        "--data.shards",
        "--cache.folder",
        "--teachers.2.summary-weight",
        "--restart",
    ):
        assert option in said


def test_a_large_cache_is_agreed_to_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheJob, "size", 2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**10))
    folders = ["--cache.folder", str(tmp_path / "caches"), "--cache.images", "3"]
    words = ["smoke", *TINY, *folders, "--out", str(tmp_path / "run")]
    with pytest.raises(RadioError, match=r"a teacher cache of 4\.0 GB would be written; agree with --yes"):
        main(words)
    assert main([*words, "--yes"]) == 0
    assert len(list((tmp_path / "caches").glob("*/*.safetensors"))) == 2  # one for each group


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    said = capsys.readouterr().out
    assert said.startswith("usage: radio-train RECIPE")
    assert all(said.count(f"\n  {name} ") == 2 for name in recipes)


SELF_EXPLAINING = {
    *("recipe", "student", "steps", "out", "seed", "device", "data.crop-aspect", "balance.kind"),
    *("loss.cosine", "loss.smooth-l1", "optim.lr", "optim.weight-decay", "optim.betas"),
}


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """A comment that tyro does not see, such as one in parentheses, would be missing."""
    with pytest.raises(SystemExit):
        main(["smoke", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    silent = {
        line.split()[0].strip("-,")
        for line, text in pairwise(lines)
        if line.startswith("--") and text.startswith("(default")
    }
    assert silent <= SELF_EXPLAINING and len(lines) > 300


def test_a_plan_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["smoke", *TINY, "--plan", "--world", "2", "--peak-tflops", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "smoke: vit-tiny12 on 2 ranks, ddp" in out
    assert "time: 2 steps in" in out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RadioError, match="--world: 0 is out of bounds"):
        main(["smoke", *TINY, "--plan", "--world", "0"])
    with pytest.raises(SystemExit):
        main(["smoke", *TINY, "--world", "2"])  # without a plan there is no such option
