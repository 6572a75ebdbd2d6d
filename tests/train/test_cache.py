"""The teacher cache holds what the teachers give, is resumed exactly, and says its size first."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as effort
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from radio.chunks import DamagedError, write_tensors
from radio.dist import Ranks
from radio.errors import DataError, RadioError
from radio.model import ModelConfig, build
from train import teacher_cache as module
from train.config import CacheConfig, DataConfig, LossConfig, TeacherConfig, TrainConfig
from train.data.crops import shuffled_index
from train.data.loader import Batch, GroupBatch, for_student
from train.data.streams import open_images
from train.distributed import can_run_in_parallel
from train.groups import make_partition
from train.setup import load_teachers, teacher_features, teacher_sizes
from train.teacher_cache import (
    CacheJob,
    FeatureCache,
    FixedCrops,
    GroupedCaches,
    agree,
    open_caches,
    write_files,
)

from .conftest import CPU, TEACHERS, Start, fill_folder, losses_of, read_records, same_weights, untimed

SIDE = 108


def make(root: Path, config: TrainConfig, *, count: int = 10, crops: int = 2, seed: int = 0) -> CacheJob:
    teachers = load_teachers(config, CPU)
    fixed = FixedCrops(open_images(config.data), config.data, SIDE, seed, count, crops)
    sizes = {name: at[config.resolution] for name, at in teacher_sizes(config, teachers).items()}
    return CacheJob(root, teachers, sizes, fixed, CPU)


def write(
    job: CacheJob,
    config: TrainConfig,
    *,
    workers: int = 0,
    confirm: Callable[[int], None] = lambda size: None,
    progress: Callable[[int], None] = lambda done: None,
    log: Callable[[str], None] = pytest.fail,
) -> GroupedCaches:
    """The cache of a run with one group, written by a process alone."""
    partition = make_partition(config, 1)
    jobs = {partition.groups[0].name: job}
    return open_caches(jobs, partition, Ranks(), workers=workers, confirm=confirm, progress=progress, log=log)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_FILE", 8)
    monkeypatch.setattr(module, "_BATCH", 3)
    monkeypatch.setattr(module, "_POLL", 0.0)
    yield
    module._opened.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def quiet() -> None:
    """Nobody is told."""


def test_rows_are_the_teachers_features_of_the_crops(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config)
    caches = write(job, config)
    cache = FeatureCache(job.folder, 20, 3, job.grids)
    assert len(list(job.folder.glob("*.safetensors"))) == 3  # of 8, 8 and 4
    for position in (0, 7, 19, 20, 41):
        row = cache[position]
        crop = job.crops[shuffled_index(position, 20, 3)].pixels
        assert torch.equal(row.pixels, crop)
        direct = teacher_features(job.teachers, job.sizes, crop[None].float() / 255)
        (group,) = make_partition(config, 1).groups
        targets = caches.targets(default_collate([row]), group, CPU)
        for name, wanted in direct.items():
            assert targets[name].grid == wanted.grid
            assert targets[name].tokens.dtype == torch.float32
            assert torch.allclose(targets[name].tokens, wanted.tokens, atol=1e-3)
            assert torch.allclose(targets[name].summary, wanted.summary, atol=1e-3)


def test_the_stream_shuffles_every_epoch(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config, count=5, crops=1)
    write(job, config)
    cache = FeatureCache(job.folder, 5, 0, job.grids)
    whole = {job.crops[entry].pixels.numpy().tobytes() for entry in range(5)}
    epochs = [[cache[5 * epoch + place].pixels.numpy().tobytes() for place in range(5)] for epoch in range(4)]
    assert all(set(epoch) == whole for epoch in epochs)
    assert any(epoch != epochs[0] for epoch in epochs)


def test_groups_have_caches_and_orders_of_their_own(config: TrainConfig, tmp_path: Path) -> None:
    few = replace(TEACHERS[2], batch_size=2)
    config = replace(config, teachers=(*TEACHERS[:2], few))
    partition = make_partition(config, 1)
    jobs = {
        group.name: make(
            tmp_path, replace(config, teachers=tuple(t for t in config.teachers if t.name in group.teachers))
        )
        for group in partition.groups
    }
    caches = open_caches(
        jobs,
        partition,
        Ranks(),
        workers=0,
        confirm=lambda size: None,
        progress=lambda done: None,
        log=pytest.fail,
    )
    first, second = (job.folder for job in jobs.values())
    assert {row.name for row in first.iterdir()} == {row.name for row in second.iterdir()}
    steps = [caches[step] for step in range(10)]  # of 4 + 2
    assert all([set(row.tokens) for row in step] == [{"clip", "dense"}, {"sam"}] for step in steps)
    crops = [job.crops[entry].pixels.numpy().tobytes() for job in jobs.values() for entry in range(20)]
    large, small = (
        [image.numpy().tobytes() for step in steps for image in step[index].pixels] for index in (0, 1)
    )
    assert sorted(large[:20]) == sorted(crops[:20])  # the larger group's first epoch
    assert sorted(small) == sorted(crops[20:])


def test_ranks_share_every_step(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config)
    write(job, config)
    caches = {make_partition(config, 1).groups[0].name: FeatureCache(job.folder, 20, 0, job.grids)}
    (alone,), *parts = (
        [GroupedCaches(caches, make_partition(config, world), rank) for rank in range(world)]
        for world in (1, 2, 4)
    )
    for step in range(7):
        (whole,) = alone[step]
        assert len(whole.pixels) == config.batch_size
        for ranks in parts:
            assert torch.equal(torch.cat([rank[step][0].pixels for rank in ranks]), whole.pixels)
    smaller = GroupedCaches(caches, make_partition(replace(config, batch_size=2), 1), 0)
    halves = [smaller[step][0].pixels for step in range(14)]
    assert torch.equal(torch.cat(halves), torch.cat([alone[step][0].pixels for step in range(7)]))


class StoppedError(Exception):
    """What a kill is here."""


@pytest.mark.parametrize("workers", [0, 1])
def test_writing_goes_on_where_it_was_stopped(config: TrainConfig, tmp_path: Path, workers: int) -> None:
    undisturbed, stopped = make(tmp_path / "one", config), make(tmp_path / "two", config)
    write(undisturbed, config)

    def stop(done: int) -> None:
        if done >= 16:
            raise StoppedError

    with pytest.raises(StoppedError):
        write(stopped, config, progress=stop)
    assert len(contents(stopped.folder)) == 2
    seen: list[int] = []
    asked: list[int] = []
    write(stopped, config, workers=workers, progress=seen.append, confirm=asked.append)
    assert set(seen) == {20}  # the first 16 were not computed again
    assert asked == []
    assert contents(stopped.folder) == contents(undisturbed.folder)


def test_any_number_of_ranks_writes_the_same(config: TrainConfig, tmp_path: Path) -> None:
    alone, shared = make(tmp_path / "one", config), make(tmp_path / "two", config)
    write(alone, config)
    shared.folder.mkdir(parents=True)
    write_files(shared, 1, 3, 0, quiet)
    assert list(contents(shared.folder)) == ["000001.safetensors"]
    write_files(shared, 0, 2, 0, quiet)  # one rank fewer after a stop
    assert list(contents(shared.folder)) == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    write_files(shared, 1, 2, 0, quiet)
    assert contents(shared.folder) == contents(alone.folder)


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """An entry with other content and a checksum that fits it, as no run has written it."""
    tensors = load_file(path)
    change(tensors)
    write_tensors(path, tensors)


def into_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def into_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: torch.save({"pixels": torch.zeros(3)}, path),
    "nested": lambda path: path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000),
    "a giant header": lambda path: path.write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}"),
    "one byte": one_byte,
    "a folder": into_folder,
    "a dead link": into_dead_link,
    "a pipe": into_pipe,
    "another file": lambda path: shutil.copy(path.with_name("000000.safetensors"), path),
    "no checksum": lambda path: save_file(load_file(path), path, metadata={"notes": '{"grids": []}'}),
    "NaN": lambda path: rewritten(path, lambda tensors: tensors["clip.summary"].fill_(torch.nan)),
    "other names": lambda path: rewritten(path, lambda tensors: tensors.pop("pixels")),
    "other rows": lambda path: rewritten(
        path, lambda tensors: tensors.update({name: t[:7].clone() for name, t in tensors.items()})
    ),
    "other types": lambda path: rewritten(
        path, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()})
    ),
    "other shapes": lambda path: rewritten(
        path, lambda tensors: tensors.update({name: t[..., :1].clone() for name, t in tensors.items()})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(
    config: TrainConfig, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    job = make(tmp_path, config)
    write(job, config)
    whole = contents(job.folder)
    module._opened.cache_clear()
    path = job.folder / "000001.safetensors"
    damage(path)
    told: list[str] = []
    write(job, config, log=told.append)
    assert contents(job.folder) == whole
    (line,) = told
    assert line.startswith(f"1 damaged file of the cache was made again; the first: {path}")
    assert {each.name for each in job.folder.iterdir()} == {"metadata.json", *whole}


@effort(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_changed_bytes_are_found(
    config: TrainConfig, tmp_path: Path, data: strategies.DataObject
) -> None:
    job = make(tmp_path, config, count=3, crops=1)
    write(job, config, log=lambda line: None)
    path = job.files[0]
    whole = path.read_bytes()
    changed = bytearray(whole)
    at = data.draw(strategies.integers(0, len(whole) - 1))
    changed[at : at + data.draw(strategies.integers(0, 9))] = data.draw(strategies.binary(max_size=9))
    path.write_bytes(changed)
    if changed == whole:
        return
    with pytest.raises(DamagedError):
        job.check(0)
    path.unlink()


def test_a_file_that_is_damaged_in_a_run_is_one_error(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config)
    caches = write(job, config)
    module._opened.cache_clear()
    for damage in (DAMAGE["empty"], DAMAGE["nested"], DAMAGE["other names"], Path.unlink):
        for path in job.files:
            damage(path)
        with pytest.raises(RadioError, match="was whole when the run began and is damaged now"):
            caches[0]
        write(job, config, log=lambda line: None)


def test_a_card_that_is_none_is_written_again(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config)
    write(job, config)
    metadata = job.folder / "metadata.json"
    right = metadata.read_bytes()
    for wrong in (b"", b"[]", b"{", b"[" * 100_000, b"9" * 5000, b"\xff\xfe{", b'{"seed": 7}'):
        metadata.write_bytes(wrong)
        asked: list[int] = []
        write(make(tmp_path, config), config, confirm=asked.append)
        assert metadata.read_bytes() == right
        assert len(asked) == 1


def test_two_runs_may_write_one_cache(config: TrainConfig, tmp_path: Path) -> None:
    jobs = [make(tmp_path, config) for _ in range(4)]

    def run(job: CacheJob) -> None:
        for _ in range(3):
            for path in job.files:
                path.unlink(missing_ok=True)
            write_files(job, 0, 1, 0, quiet)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, jobs))
    assert not list(jobs[0].folder.glob(".*"))


def test_a_disk_that_is_full_while_writing_leaves_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path, config)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    agree([job], Ranks(), lambda size: None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(job, config)
    assert caught.value.filename == str(job.files[0])
    assert [path.name for path in job.folder.iterdir()] == ["metadata.json"]


def test_a_rank_waits_for_what_others_write(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first of two ranks, whose other one is a thread here."""
    job = make(tmp_path, config)
    partition = replace(
        make_partition(config, 1),
        groups=tuple(replace(group, ranks=(0, 1)) for group in make_partition(config, 1).groups),
    )
    jobs = {partition.groups[0].name: job}
    other = threading.Timer(0.2, write_files, (make(tmp_path, config), 1, 2, 0, quiet))
    other.start()
    seen: list[int] = []
    open_caches(
        jobs, partition, Ranks(), workers=0, confirm=lambda size: None, progress=seen.append, log=pytest.fail
    )
    other.join()
    assert seen[-1] == 20
    assert len(contents(job.folder)) == 3
    (job.folder / "000001.safetensors").unlink()
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with pytest.raises(
        RadioError, match=r"000001.* other ranks were to write this and have written nothing for"
    ):
        open_caches(
            jobs,
            partition,
            Ranks(),
            workers=0,
            confirm=lambda size: None,
            progress=seen.append,
            log=pytest.fail,
        )


def test_a_whole_cache_is_only_opened(config: TrainConfig, tmp_path: Path) -> None:
    job = make(tmp_path, config)
    first = write(job, config)
    before = {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}

    def never(number: int) -> None:
        raise AssertionError("nothing is to be asked")

    again = write(make(tmp_path, config), config, confirm=never)
    assert {path: path.stat().st_mtime_ns for path in job.folder.iterdir()} == before
    assert torch.equal(again[3][0].pixels, first[3][0].pixels)


def test_the_key_follows_weights_transform_and_data(config: TrainConfig, tmp_path: Path) -> None:
    def key(config: TrainConfig, seed: int = 0, **counts: int) -> str:
        return make(tmp_path, config, seed=seed, **counts).folder.name

    weights = (replace(TEACHERS[0], model="tiny:clip2"), *TEACHERS[1:])
    resolution = (replace(TEACHERS[0], resolution=60), *TEACHERS[1:])
    other = fill_folder(tmp_path / "other", 23)
    same = fill_folder(tmp_path / "same", 24)
    base = key(config)
    assert key(replace(config, data=replace(config.data, images=(same,)))) == base
    assert key(replace(config, optim=replace(config.optim, lr=1.0), steps=99, batch_size=2)) == base
    changed = [
        key(replace(config, teachers=weights)),
        key(replace(config, teachers=resolution)),
        key(replace(config, teachers=TEACHERS[:2])),
        key(replace(config, data=replace(config.data, images=(other,)))),
        key(replace(config, data=replace(config.data, crop_scale=(0.5, 1.0)))),
        key(replace(config, data=replace(config.data, crop_aspect=(1.0, 1.0)))),
        key(replace(config, data=replace(config.data, flip=0.0))),
        key(config, count=9),
        key(config, crops=3),
        key(config, seed=1),
    ]
    assert len({base, *changed}) == 1 + len(changed)


def test_the_size_is_told_first_and_exact(config: TrainConfig, tmp_path: Path) -> None:
    told: list[int] = []

    def confirm(size: int) -> None:
        assert not (tmp_path / "caches").exists()
        told.append(size)

    job = make(tmp_path / "caches", config)
    write(job, config, confirm=confirm)
    held = [load_file(path) for path in job.folder.glob("*.safetensors")]
    assert told == [sum(tensor.nbytes for file in held for tensor in file.values())]
    assert {name for file in held for name in file} == {
        "pixels",
        *(f"{t.name}.{kind}" for t in TEACHERS for kind in ("summary", "tokens")),
    }


def test_a_refusal_leaves_nothing(config: TrainConfig, tmp_path: Path) -> None:
    def refuse(size: int) -> None:
        raise RadioError("not written")

    with pytest.raises(RadioError, match="not written"):
        write(make(tmp_path / "caches", config), config, confirm=refuse)
    assert not (tmp_path / "caches").exists()


def test_a_full_disk_is_told_before_writing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RadioError, match=r"GB does not fit, 0\.0 GB are free; take fewer images or crops"):
        write(make(tmp_path / "caches", config), config)
    assert not (tmp_path / "caches").exists()


def test_features_beyond_half_precision_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    huge = replace(config, teachers=(replace(TEACHERS[1], model="tiny:huge"),))
    with pytest.raises(RadioError, match="teacher dense gives features beyond half precision"):
        write_files(make(tmp_path, huge), 0, 1, 0, quiet)


def test_too_many_broken_images_stop_the_writing(config: TrainConfig, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 4, broken=12)
    mixed = replace(config, data=DataConfig(images=(folder,), workers=0))
    with pytest.raises(DataError, match="images cannot be read; mend the data"):
        write(make(tmp_path / "caches", mixed, count=16), mixed)


def test_training_from_the_cache_is_training_online_on_the_same_crops(
    config: TrainConfig, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = TeacherConfig(name="sam", model="tiny:sam", summary_weight=0.0, batch_size=2)
    options = CacheConfig(folder=tmp_path / "caches", images=10, crops=2)
    config = replace(config, teachers=(*TEACHERS[:2], few), cache=options)
    start(config, out=tmp_path / "cached").train()
    assert read_records(tmp_path / "cached")[-1]["broken"] == 0

    run = start(config, out=tmp_path / "online")

    def online(self: GroupedCaches, *place: Any) -> Iterator[Batch]:
        for step in self.rows(*place):
            batches = []
            for group, row in zip(run.groups, step, strict=True):
                images = row.pixels.float() / 255
                targets = run.run_teachers(0, group, images)
                batches.append(GroupBatch(group, for_student(images, group.sides[0]), targets))
            yield Batch(tuple(batches), 0.0)

    monkeypatch.setattr(GroupedCaches, "batches", online)
    run.train()
    cached, direct = losses_of(tmp_path / "cached"), losses_of(tmp_path / "online")
    assert cached == pytest.approx(direct, rel=1e-3)  # half precision
    assert cached != direct
    assert cached[-1] < cached[0]


def test_a_cached_run_repeats_bit_for_bit(config: TrainConfig, tmp_path: Path, start: Start) -> None:
    options = replace(config.cache, folder=tmp_path / "caches", images=10, crops=2)
    for name, workers in (("a", 0), ("b", 2)):
        data = replace(config.data, workers=workers)
        start(config, cache=options, out=tmp_path / name, data=data, steps=6).train()
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert len(list((tmp_path / "caches").iterdir())) == 1


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_groups_that_go_abreast_learn_what_they_learn_in_turn(
    config: TrainConfig, tmp_path: Path, start: Start, two_threads: None, grad_accum_steps: int
) -> None:
    few = TeacherConfig(name="sam", model="tiny:sam", student_resolution=72, batch_size=2)
    options = CacheConfig(folder=tmp_path / "caches", images=10, crops=2)
    config = replace(
        config, teachers=(*TEACHERS[:2], few), cache=options, grad_accum_steps=grad_accum_steps, steps=6
    )
    threads: dict[str, set[str]] = {}
    for name in ("abreast", "in turn"):
        run = start(config, out=tmp_path / name)
        assert run.parallel_groups
        run.parallel_groups = name == "abreast"
        seen = threads.setdefault(name, set())
        run.loss.register_forward_pre_hook(lambda *_, seen=seen: seen.add(threading.current_thread().name))
        run.train()
    assert threads["in turn"] == {threading.current_thread().name}
    assert len(threads["abreast"]) == 2
    assert untimed(tmp_path / "abreast") == untimed(tmp_path / "in turn")
    assert same_weights(tmp_path / "abreast", tmp_path / "in turn")


@pytest.mark.parametrize(
    ("student", "device", "teachers", "cached", "wanted"),
    [
        ("vit-tiny12", "cpu", 2, True, True),
        ("vit-tiny12", "cuda", 2, True, False),
        ("vit-tiny12", "cpu", 1, True, False),
        ("vit-tiny12", "cpu", 2, False, False),  # the other thread has the teachers
        ("e-radio-tiny", "cpu", 2, True, False),  # batch norms
    ],
)
def test_which_runs_go_abreast(
    config: TrainConfig,
    tmp_path: Path,
    two_threads: None,
    student: str,
    device: str,
    teachers: int,
    cached: bool,
    wanted: bool,
) -> None:
    sides = (None, 72)
    named = tuple(replace(TEACHERS[n], student_resolution=sides[n]) for n in range(teachers))
    options = CacheConfig(folder=tmp_path if cached else None)
    config = replace(config, teachers=named, cache=options)
    partition = make_partition(config, 1)
    model = build(ModelConfig(student=student), 0)
    assert can_run_in_parallel(model, config, partition, Ranks(), torch.device(device)) == wanted
    balanced = replace(config, balance=replace(config.balance, kind="adaloss"), grad_accum_steps=2)
    assert can_run_in_parallel(model, balanced, partition, Ranks(), torch.device(device)) == wanted
    angle = LossConfig(summary="angle", dispersion="running")
    assert (
        can_run_in_parallel(model, replace(config, loss=angle), partition, Ranks(), torch.device(device))
        == wanted
    )
    # whose sums depend on the order
    for parts in (replace(balanced, grad_accum_steps=3), replace(config, loss=angle, grad_accum_steps=2)):
        assert not can_run_in_parallel(model, parts, partition, Ranks(), torch.device(device))
    torch.set_num_threads(1)
    assert not can_run_in_parallel(model, config, partition, Ranks(), torch.device(device))


def test_a_large_cache_needs_consent(
    config: TrainConfig, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheJob, "size", 10**15)
    options = replace(config.cache, folder=tmp_path / "caches")
    with pytest.raises(RadioError, match=r"GB would be written; agree with --yes"):
        start(config, cache=options)
    assert not (tmp_path / "caches").exists()
    with pytest.raises(RadioError, match="does not fit"):
        start(config, cache=replace(options, confirm=False))


def test_a_cache_does_not_know_weights(config: TrainConfig, tmp_path: Path, start: Start) -> None:
    options, data = replace(config.cache, folder=tmp_path / "caches"), replace(config.data, weights=(1.0,))
    with pytest.raises(RadioError, match=r"leave --data\.weights out"):
        start(config, cache=options, data=data)
