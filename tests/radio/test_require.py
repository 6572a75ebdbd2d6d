"""Optional libraries: another thread's import is waited for, and what is missing names its extra."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from radio.errors import MissingExtraError, require


def test_a_module_that_another_thread_is_importing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.2)\ndecode = len\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[bool] = []

    def import_it() -> None:
        found.append(hasattr(require("slow_to_import", extra="sam"), "decode"))

    threads = [threading.Thread(target=import_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_what_is_missing_names_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'no_such_library is not installed; .*"am-radio\[sam\]"'):
        require("no_such_library", extra="sam")
