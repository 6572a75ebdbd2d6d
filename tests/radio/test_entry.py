from __future__ import annotations

import ctypes
import importlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import radio
from radio import entry
from radio.errors import ConfigError, DataError, RadioError, ShadowedPackageError, one_line

ROOT = Path(radio.__file__).resolve().parent.parent
COMMANDS = [(entry.train, "train.cli"), (entry.evaluate, "evals.cli")]


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """As in a fresh process: neither package was imported yet; afterwards everything as before."""
    guarded = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in {"train", "evals"}
    }
    for name in guarded:
        del sys.modules[name]
    importlib.invalidate_caches()
    yield
    sys.modules.update(guarded)


def _cli(monkeypatch: pytest.MonkeyPatch, main: Callable[[Sequence[str] | None], int]) -> list[str]:
    """Names of the modules that entry asks for; each of them gets `main`."""
    asked: list[str] = []

    def imported(name: str) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(main=main)

    monkeypatch.setattr(importlib, "import_module", imported)
    return asked


def _decoy(folder: Path, name: str, *, package: bool) -> Path:
    path = folder / name if package else folder / f"{name}.py"
    source = path / "__init__.py" if package else path
    source.parent.mkdir(exist_ok=True)
    source.write_text("raise AssertionError('the decoy was imported')\n")
    return path


def test_the_packages_beside_radio_are_accepted() -> None:
    entry.check_not_shadowed()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", ["train", "evals"])
@pytest.mark.parametrize("package", [True, False])
def test_a_decoy_earlier_on_the_path_is_named_and_not_imported(
    name: str, package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = _decoy(tmp_path, name, package=package)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ShadowedPackageError, match="PYTHONPATH") as caught:
        entry.check_not_shadowed()
    assert str(decoy) in str(caught.value)
    assert str(ROOT / name) in str(caught.value)


@pytest.mark.usefixtures("_forgotten")
def test_a_decoy_later_on_the_path_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _decoy(tmp_path, "train", package=False)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path)])
    entry.check_not_shadowed()


@pytest.mark.usefixtures("_forgotten")
def test_a_folder_without_init_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evals").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    entry.check_not_shadowed()


def test_an_absent_package_is_named() -> None:
    with pytest.raises(ShadowedPackageError, match="'no_such_package' is not installed"):
        entry.check_not_shadowed(["no_such_package"])


@pytest.mark.parametrize(("command", "module"), COMMANDS)
@pytest.mark.parametrize("code", [0, 1, 2])
def test_arguments_go_in_and_the_code_comes_out(
    command: Callable[[Sequence[str]], int], module: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str] | None] = []

    def main(argv: Sequence[str] | None) -> int:
        seen.append(argv)
        return code

    asked = _cli(monkeypatch, main)
    assert command(["demo", "--steps", "3"]) == code
    assert asked == [module]
    assert seen == [["demo", "--steps", "3"]]


@pytest.mark.parametrize(("command", "module"), COMMANDS)
@pytest.mark.parametrize("error", [RadioError("no such file\nx.pt"), ConfigError("no such file x.pt")])
def test_a_user_error_is_one_line_and_code_2(
    command: Callable[[], int],
    module: str,
    error: RadioError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise error

    _cli(monkeypatch, main)
    assert command() == 2
    assert capsys.readouterr() == ("", "error: no such file x.pt\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a/x.html"), "a/x.html: No space left on device; free"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied; choose a place that you may"),
        (OSError(5, "Input/output error", "t", None, "new"), "new: Input/output error"),
        (MemoryError(), "not enough memory; take less at once"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes. Error"),
         "not enough memory (tried to allocate 512 bytes)"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), "(tried to allocate 20.00 gib)"),
        (ConfigError("a\x1b[31m\u2028b\ud83d"), r"a\x1b[31m b\ud83d"),
    ],
)  # fmt: skip
def test_what_the_system_or_the_memory_refuses_is_one_line_too(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise error

    _cli(monkeypatch, main)
    assert entry.evaluate([]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and line in told


def test_an_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt

    _cli(monkeypatch, main)
    assert entry.train([]) == 130


def test_our_own_slips_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise ValueError("a slip")

    _cli(monkeypatch, main)
    with pytest.raises(ValueError, match="a slip"):
        entry.evaluate([])


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("command", [entry.train, entry.evaluate])
def test_a_shadowed_package_stops_either_command(
    command: Callable[[Sequence[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _decoy(tmp_path, "train", package=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert command(["--help"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / 'train.py'} comes before")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("content", [b"[console_scripts]\nno equals sign\n", b"[am_radio]\nx = \xff\n"])
def test_a_package_whose_entry_points_are_damaged_is_named(
    tmp_path: Path, command: str, content: bytes
) -> None:
    """In a process of its own: torch looks at them while it is imported."""
    folder = tmp_path / "half_made-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: half-made\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_bytes(content)
    program = f"import sys; from radio import entry; sys.exit(entry.{command}(['list']))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: the entry_points.txt of half-made cannot be read (")
    assert done.stderr.count("\n") == 1


RANK = """
import time
from radio.entry import end_with_torchrun
end_with_torchrun()
print("on", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_rank_ends_with_a_torchrun_that_is_killed() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"},
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"on\n"
    launcher.kill()
    launcher.wait()
    begin = time.monotonic()
    assert launcher.stdout.read() == b""  # its end, which comes when the rank has closed it too
    assert time.monotonic() - begin < 20
    launcher.stdout.close()


@pytest.mark.parametrize(
    ("command", "library"), [pytest.param("train", "tyro", marks=pytest.mark.slow), ("evaluate", "pydantic")]
)
def test_an_absent_library_is_named(command: str, library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None; from radio import entry; sys.exit(entry.{command}([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the library {library} is not installed; get am-radio with all it needs: pip install -e .\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_of_the_output_lacks_is_shown_by_number(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding)

    def main(argv: Sequence[str] | None) -> int:
        sys.stdout.write("runs/日")
        return 0

    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    assert entry.train([]) == 0
    out.flush()
    assert out.buffer.getvalue() == rb"runs/\u65e5"  # type: ignore[attr-defined]


def test_a_line_of_an_error_can_be_read() -> None:
    line = one_line(DataError("x" * 1_000_000 + " in a.json; mend it"))
    assert line is not None and len(line) < 2100 and line.endswith("in a.json; mend it")


_FAULTS = """
import ctypes, resource
from radio import entry
entry.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    block = libc.malloc(100 << 20)
    libc.memset(block, 1, 100 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    def faults(**extra: str) -> int:
        own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", _FAULTS]
        return int(subprocess.run(command, env={**own, **extra}, check=True, capture_output=True).stdout)

    pages = 5 * (100 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults() < pages / 100
    assert faults(MALLOC_ARENA_MAX="8") > faults()  # the user's own settings stay as they are


_LOADED = """
import sys
before = set(sys.modules)
from radio import entry
try:
    code = getattr(entry, sys.argv[1])(sys.argv[2:])
except SystemExit as stop:  # tyro's, after help or for an option that it does not know
    code = stop.code
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(code, *sorted(name for name in loaded if not name.startswith("_")))
"""
_LIGHT = {
    *("radio", "evals", "train"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("tyro", "docstring_parser", "typeguard", "rich"),
    *("yaml", "cython_runtime", "braceexpand"),
}
"""What may be loaded before something runs: each of them takes less than a tenth of a second."""


def _loaded(command: str, arguments: Sequence[str]) -> tuple[str, set[str], str]:
    """Exit code of a command in a process of its own, the packages that it loaded, and its output."""
    program = [sys.executable, "-c", _LOADED, command, *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    code, *packages = done.stdout.splitlines()[-1].split()
    return code, set(packages), " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("command", "arguments", "code", "shown"),
    [
        ("evaluate", "", "0", "usage: radio-eval"),
        ("evaluate", "--help", "0", "usage: radio-eval"),
        ("evaluate", "list", "0", "Weighted k-nearest-neighbour"),
        ("evaluate", "kmn", "2", "did you mean knn"),
        ("evaluate", "knn --help", "0", "--leave-one-out"),
        ("evaluate", "knn --bnak x", "2", "--bank"),
        ("evaluate", "knn --k 0", "2", "give one or more numbers of neighbours"),
        ("evaluate", "all --help", "0", "--seg.iterations"),
        ("evaluate", "noise --help", "0", "--repeats"),
        ("evaluate", "knn cpkt.pt", "2", "cpkt.pt: no such checkpoint file"),
        ("evaluate", "knn vit-g15", "2", "did you mean vit-g14"),
        ("evaluate", "knn arch:vit-g15 --random-init", "2", "did you mean vit-g14"),
        ("evaluate", "all dinov3:vitb16", "2", "did you mean dinov2"),
        ("evaluate", "throughput --help", "0", "--table6"),
        ("evaluate", "report --help", "0", "--html"),
        ("export", "--help", "0", "usage: radio-export"),
        ("export", "ckpt.pt --to onxn out.onnx", "2", "--to"),
        ("export", "ckpt.pt --to onnx out.pt", "2", "ends in .onnx"),
        ("train", "", "2", "usage: radio-train"),
        ("train", "--help", "0", "table11"),
        ("train", "dmeo", "2", "did you mean demo"),
        ("train", "demo --help", "0", "--student.registers"),
        ("train", "demo --optim.lrr 3", "2", "--optim.lr"),
        ("train", "demo --student vitdet-b14 --help", "0", "--student.schedule"),
        ("train", "demo --student e-radio-b --student.windw 3", "2", "--student.window"),
        ("train", "demo --plan --help", "0", "--utilisation"),
        ("train", "table3 --help", "0", "--rows"),
        ("train", "table6 --help", "0", "--price-per-gpu-hour"),
    ],
)
def test_usage_options_and_wrong_names_come_without_torch(
    command: str, arguments: str, code: str, shown: str
) -> None:
    ended, packages, output = _loaded(command, arguments.split())
    assert ended == code and shown in output
    assert packages <= _LIGHT


_OPTIONAL = {
    *("accelerate", "cv2", "faiss", "gguf", "jinja2", "matplotlib", "mmcv", "mmengine", "mmseg", "onnx"),
    *("open_clip", "peft", "pycocotools", "scipy", "segment_anything", "transformers"),
}
"""What the extras install."""


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ("knn arch:vit-tiny12 --scenes 60 60 --k 5", {"faiss"}),
        pytest.param("maps arch:vit-tiny12 --num-images 2", set(), marks=pytest.mark.slow),
        pytest.param(
            "sam scenes:sam --scenes 4", {"pycocotools", "scipy", "segment_anything"}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_task_imports_its_own_libraries_only(arguments: str, own: set[str], tmp_path: Path) -> None:
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    code, packages, output = _loaded("evaluate", [*arguments.split(), *folders])
    assert code == "0", output
    assert packages & _OPTIONAL == own
