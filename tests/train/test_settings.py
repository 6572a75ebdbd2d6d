"""Settings that make no sense are one error, before any work, from a file or a command line."""

from __future__ import annotations

import io
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from radio import entry
from radio.config import from_plain, read_yaml, to_plain
from radio.errors import ConfigError, RadioError
from train.config import DataConfig, TeacherConfig, TrainConfig
from train.loggers import ProgressConsole, say
from train.recipes import recipes
from train.setup import check_settings

from .conftest import TEACHERS, Start, fill_shard

NAN, INF = float("nan"), float("inf")

BAD: tuple[tuple[str, Any], ...] = (
    *(("optim.lr", value) for value in (NAN, INF, -1.0, 1e30)),
    *(("optim.betas", value) for value in ([2.0, 2.0], [NAN, 0.9], [1.0, 0.9], [-0.1, 0.9])),
    *(("optim.warmup", value) for value in (NAN, -1.0, 2.0)),
    *(("optim.clip", value) for value in (NAN, -1.0)),
    *(("optim.final_lr", value) for value in (NAN, -1.0)),
    *(("optim.weight_decay", value) for value in (NAN, -1.0)),
    *(("seed", value) for value in (-1, 10**26, 10**400)),
    *(("steps", value) for value in (0, 10**26, 10**12)),
    *(("batch_size", value) for value in (0, -4, 10**12)),
    *(("resolution", value) for value in (0, 10**6)),
    *(("data.scenes", value) for value in (-1, 10**21, 10**12)),
    ("data.scenes_seed", -1),
    ("data.scenes_domain", "day"),
    *(("data.crop_scale", value) for value in ([1.0, 0.1], [NAN, 1.0], [0.0, 0.0], [0.5, 7.0])),
    *(("data.crop_aspect", value) for value in ([2.0, 1.0], [0.0, 1.0], [1.0, INF])),
    *(("data.workers", value) for value in (-1, 100_000)),
    *(("data.flip", value) for value in (7.0, -0.5, NAN)),
    *(("data.weights", value) for value in ([INF], [0.0], [-1.0])),
    *(("data.num_streams", value) for value in (0, 10**12)),
    *(("data.max_error_fraction", value) for value in (NAN, 2.0)),
    *(("loss.smooth_l1_beta", value) for value in (-1.0, NAN)),
    *(("loss.cosine", value) for value in (-1.0, INF)),
    ("loss.summary", "huber"),
    *(("adaptor.hidden", value) for value in (-1, 0, 10**11)),
    *(("options.registers", value) for value in (-1, 10**12)),
    *(("ema", value) for value in (1.0, -0.1, NAN)),
    *(("keep_last", value) for value in (0, 10**12)),
    ("keep_every", -1),
    ("windows", [0]),
    ("grad_accum_steps", 0),
    ("peak_tflops", 0.0),
    ("balance.momentum", 1.0),
    ("cache.images", 0),
    ("teachers.0.batch_size", 0),
    ("teachers.0.resolution", 10**9),
    *(("teachers.0.spatial_weight", value) for value in (-1.0, 1e300)),
    ("out", "a\0b"),
    ("student", "x" * 100_000),
    ("recipe", "x" * 100_000),
)


def with_value(plain: Any, place: str, value: Any) -> Any:
    """Plain settings with another value at a place such as `teachers.0.name`."""
    key, _, rest = place.partition(".")
    index: Any = int(key) if isinstance(plain, list) else key
    copy = plain.copy()
    copy[index] = with_value(copy[index], rest, value) if rest else value
    return copy


@pytest.mark.parametrize(("place", "value"), BAD, ids=lambda value: str(value)[:20])
def test_values_out_of_bounds_are_refused_by_the_name_that_they_were_given_by(
    tmp_path: Path, place: str, value: Any
) -> None:
    plain = with_value(to_plain(recipes["smoke"]()), place, value)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(RadioError) as caught:
        check_settings(read_yaml(TrainConfig, path), 1)
    message = str(caught.value).removeprefix(f"{path}: ")
    assert len(message) < 400
    if place != "student":
        written = place.replace("teachers.0", "teachers[0]")
        assert message.startswith((written, f"--{place.replace('_', '-')} ")), message


def _places(kind: Any, value: Any, where: str = "") -> list[str]:
    found = []
    for field in fields(kind):
        inner, name = getattr(value, field.name), f"{where}{field.name}"
        found += _places(inner, inner, f"{name}.") if is_dataclass(inner) else [name]
    return found


PLACES = [*_places(TrainConfig, recipes["smoke"]()), "teachers.0.name", "teachers.1.batch_size"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**12, 10**26, -(10**26), 2**63 - 1, 1, 0, -1, 0.5])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_of_any_setting_is_taken_or_told(tmp_path: Path, place: str, value: Any) -> None:
    plain = with_value(to_plain(recipes["smoke"]()), place, value)
    told = ""
    try:
        config = from_plain(TrainConfig, plain)
        check_settings(replace(config, out=tmp_path / "run"), 1)
    except RadioError as error:
        told = str(error)
    assert len(told) < 800


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert entry.train(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr", "nan"], "--optim.lr: nan is no number to work with"),
        (["--optim.lr", "-1"], "--optim.lr: -1.0 is out of bounds; give a number of at least 0"),
        (["--optim.betas", "0.9", "2"], "--optim.betas: 2.0 is out of bounds"),
        (["--seed", "-1"], "--seed: -1 is out of bounds"),
        (["--steps", "1" + "0" * 26, "--plan"], "--steps: 1"),
        (["--teachers.1.spatial-weight", "inf"], "--teachers.1.spatial-weight: inf is no number"),
        (["--data.crop-scale", "1", "0.5"], "--data.crop-scale 1.0 0.5: the first is to be the lower one"),
        (["--teachers.0.name", "a\udcff"], "a teacher cannot be named 'a\\udcff', which is no UTF-8 text"),
        (["--score", "knn", "evil"], "unknown evaluator 'evil'"),
        (["--eval-every", "5", "--eval-tasks", "evil"], "unknown evaluator 'evil'"),
        (["--world", "1000000000", "--plan"], "--world: 1000000000 is out of bounds"),
        (["--utilisation", "nan", "--plan"], "--utilisation: nan is no number"),
    ],
)
def test_a_command_line_is_refused_before_anything_is_written(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(["smoke", *words], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "broken.jsonl", "ckpt.pt"])
def test_a_folder_where_a_file_of_the_run_goes_is_told(config: TrainConfig, name: str) -> None:
    (config.out / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{name}: is a folder, and the run writes a file of that name"):
        check_settings(config, 1)


@pytest.mark.parametrize("name", ["state", "reports", "tensorboard"])
def test_a_file_where_a_folder_of_the_run_goes_is_told(config: TrainConfig, name: str) -> None:
    config.out.mkdir()
    (config.out / name).touch()
    with pytest.raises(ConfigError, match=f"{name}: is no folder, and the run needs one of that name"):
        check_settings(config, 1)


def test_a_file_in_the_run_folders_place_is_told(config: TrainConfig) -> None:
    config.out.touch()
    with pytest.raises(ConfigError, match="run: is no folder; give another one"):
        check_settings(config, 1)


def test_commands_in_a_settings_file_need_a_word(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the command line are the user's own; a file may be anybody's."""
    shard, ran = fill_shard(tmp_path / "a.tar", 0, 8), tmp_path / "ran"
    command = f"touch {ran}; cat {shard}"
    data = DataConfig(shards=(f"pipe:{command}",), workers=0)
    plain = to_plain(replace(config, teachers=TEACHERS[:1], steps=1, data=data))
    path = tmp_path / "settings.yaml"
    for pattern in (f"pipe:{command}", f"{{{shard},pipe:{command}}}", f"{{p,x}}ipe:{command}"):
        path.write_text(yaml.safe_dump(with_value(plain, "data.shards", [str(shard), pattern])))
        said = refused([str(path)], capsys)
        assert f"{path}: data.shards would run the command 'touch " in said
        assert "--allow-pipes" in said
        assert not ran.exists()
    assert not config.out.exists()
    assert entry.train([str(path), "--data.shards", str(shard)]) == 0
    assert not ran.exists()
    path.write_text(yaml.safe_dump(plain))
    words = ["--out", str(tmp_path / "other")]
    assert entry.train([str(path), "--allow-pipes", *words]) == 0
    assert ran.exists()
    ran.unlink()
    typed = ["--data.shards", f"pipe:{command}", "--restart", *words]
    assert entry.train([str(path), *typed]) == 0
    assert ran.exists()
    own = tmp_path / "other" / "config.yaml"
    assert "--allow-pipes" in refused([str(own)], capsys)


def test_nothing_in_a_name_is_markup(config: TrainConfig, start: Start) -> None:
    names = (
        TeacherConfig(name="[/b]", model="tiny:clip"),
        TeacherConfig(name="\x1b[31m", model="tiny:dense"),
    )
    run = start(config, steps=1, recipe="[/b]\x1b[0m", teachers=names, out=config.out / "[bold]")
    run.train()
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/b]\\x1b[0m 1/1  loss " in told
    assert "\\x1b[31m " in told
    assert "\x1b" not in told


def test_a_bar_and_a_line_show_what_they_are_given() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with ProgressConsole(console, "[/b]\a", 2, 0) as bar:
        bar.advance(1, "[/i] :smile: \a")
    say(console, "[/b] :smile: \x1b[2J")
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[/b]\\x07" in told
    assert "[/i] :smile: \\x07" in told
    assert "[/b] :smile: \\x1b[2J\n" in told


@pytest.mark.parametrize(
    ("weights", "options"),
    [((0.0, 0.0), []), ((0.0, 1.0), ["--loss.cosine", "0", "--loss.smooth-l1", "0"])],
)
def test_a_run_without_a_weighted_loss_is_refused(
    weights: tuple[float, float], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, spatial = weights
    given = [
        f"--teachers.{n}.{part}-weight={value}"
        for n in range(3)
        for part, value in (("summary", summary), ("spatial", spatial))
    ]
    assert entry.train(["smoke", f"--out={tmp_path / 'run'}", *given, *options]) == 2
    assert "no loss of any teacher has a weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_what_the_run_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.train(["smoke", "--plan", "--score", "zeroshoot"]) == 2
    assert "did you mean zeroshot?" in capsys.readouterr().err
