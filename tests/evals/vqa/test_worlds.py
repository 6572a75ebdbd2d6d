"""Generated folders: whole, once, and made again where somebody damaged them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from evals.vqa.benchmarks import write_benchmarks
from evals.vqa.scenes_mix import Mix, write_mix
from radio.chunks import Damage

Make = Callable[[Path, Damage], object]


def benchmarks(root: Path, damage: Damage) -> object:
    """The smallest benchmarks."""
    return write_benchmarks(root, 1, 0, size=32, damage=damage)


def mix(root: Path, damage: Damage) -> object:
    """The smallest mix."""
    return write_mix(root, Mix(count=1, size=32), damage)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", [benchmarks, mix])
def test_a_damaged_folder_is_made_again(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "world"
    make(root, Damage())
    whole = contents(root)
    metadata = next(name for name in whole if name in ("metadata.json", "benchmarks.json"))
    for name in whole:
        for content in (whole[name][:-5], b"[" * 100_000, None):
            if content is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(content)
            if name == metadata and content is None:
                continue  # a folder without metadata may be somebody else's
            damage = Damage()
            make(root, damage)
            assert contents(root) == whole
            assert "1 damaged file of the cache was made again" in damage.notes()[0]
        if name == metadata:
            (root / metadata).write_bytes(whole[metadata])
    assert [path.name for path in tmp_path.iterdir()] == ["world"]  # nothing half-made stays


@pytest.mark.parametrize("make", [benchmarks, mix])
def test_who_comes_second_takes_what_stands(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evals.vqa import worlds

    root = tmp_path / "world"
    make_folder = worlds.make_folder

    def overtaken(target: Path, fill: Callable[[Path], None]) -> bool:
        make_folder(target, fill)  # another process is quicker
        (target / "theirs").touch()
        return make_folder(target, fill)

    monkeypatch.setattr(worlds, "make_folder", overtaken)
    partial(make, root)(Damage())
    assert (root / "theirs").exists() and [path.name for path in tmp_path.iterdir()] == ["world"]
