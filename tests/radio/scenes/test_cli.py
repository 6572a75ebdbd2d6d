import json
from pathlib import Path

import pytest

from radio.scenes.cli import main


def test_writes_the_world_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(out), "--count", "4", "--layout", "coco", "--size", "32", "--seed", "1"]
    assert main(arguments) == 0
    assert "wrote 4 + 1 scenes, layout coco" in capsys.readouterr().err
    metadata = json.loads((out / "scenes.json").read_text())
    assert (metadata["count"], metadata["val_count"], metadata["size"], metadata["seed"]) == (4, 1, 32, 1)
    assert main(arguments) == 0
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "cocoo"], "error: unknown layout 'cocoo'; did you mean coco?"),
        (["--count", "0"], "--count: 0 is out of bounds; give a number of at least 1"),
        (["--size", "3"], "--size: 3 is out of bounds; give a number of at least 32 and of at most 1024"),
    ],
)
def test_a_user_error_is_one_line_and_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_an_unknown_option_is_code_two(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), "--cuont", "4"])
    assert stop.value.code == 2
