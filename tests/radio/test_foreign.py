"""Students, teachers and evaluators of other packages: what is wrong is one line that names them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.core.evaluator import evaluators
from radio import entry
from radio.config import write_yaml
from radio.registry import Registry
from radio.students import students
from radio.teachers import families
from train.config import DataConfig, TeacherConfig, TrainConfig

REGISTRIES: tuple[Registry, ...] = (students, families, evaluators)

STUDENT = """
import hashlib
from dataclasses import make_dataclass
import torch
from torch import nn
from evals.core.evaluator import Evaluator, Result
from evals.core.report import Metric
from radio.types import Features
from radio.ops import nearest_multiple


class Odd(nn.Module):
    name, native_size, summary_dim, token_dim, text = "odd", (32, 32), 8, 8, None

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 16, 16)

    @property
    def fingerprint(self):
        return hashlib.sha256(repr(self.state_dict()).encode()).hexdigest()

    def nearest_size(self, height, width):
        return nearest_multiple(height, 16), nearest_multiple(width, 16)

    def sample_crops(self, batch, generator):
        return None

    def to(self, *args):
        return super().to(*args)

    def forward(self, images, drawn=None):
        maps = self.patch(images)
        tokens = maps.flatten(2).mT
        return Features(tokens.mean(1), tokens, tuple(maps.shape[2:]))


class Student(Odd):
    {body}


class Teacher(Odd):
    {teacher}


Settings = make_dataclass("Settings", [*[{field}], ("depth", int, 1)], frozen=True)


def missing_requirements(model):
    {missing_requirements}


def score(model, settings, run):
    {score}


def student(options):
    return Student()


def teacher(name, file):
    return Teacher().eval()


def scorer():
    return Evaluator(
        name="odd-task", settings=Settings, evaluate=score, missing_requirements=missing_requirements
    )
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that installs a package with a student, a teacher and an evaluator, changed as asked."""

    def put(**changes: str) -> None:
        info = tmp_path / "site" / "odd_things-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-things\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[am_radio.students]\nodd = odd_things:student\n[am_radio.teachers]\nodds = odd_things:teacher\n"
            "[am_radio.evaluators]\nodd-task = odd_things:scorer\n"
        )
        parts = {
            "body": "pass",
            "teacher": "pass",
            "field": "",
            "missing_requirements": "return ''",
            "score": "1 / 0",
        } | changes
        code = STUDENT
        for name, text in parts.items():
            code = code.replace(f"{{{name}}}", text)
        (tmp_path / "site" / "odd_things.py").write_text(code)
        for registry in REGISTRIES:  # our own entries come before this test's, and stay after it
            assert list(registry)
            for module in set(registry._declared.values()):
                importlib.import_module(module)
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.delitem(sys.modules, "odd_things", raising=False)
        for registry in REGISTRIES:
            for part in ("_entries", "_plugins"):
                monkeypatch.setattr(registry, part, dict(getattr(registry, part)))
            monkeypatch.setattr(registry, "_plugins_read", False)

    return put


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of four noisy images each, for k-NN and for a run."""
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "images" / f"class-{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def evaluate(task: str, model: str, images: Path, *options: str) -> int:
    data = ["--bank", str(images), "--query", str(images), "--k", "2"] if task == "knn" else []
    out = ["--out", str(images.parent / "reports")]
    return entry.evaluate([task, model, *data, *out, "--device", "cpu", *options])


def train(images: Path, **changes: object) -> int:
    config = TrainConfig(
        recipe="test",
        student="odd",
        teachers=(TeacherConfig(name="clip", model="scenes:dense"),),
        resolution=32,
        steps=1,
        batch_size=4,
        out=images.parent / "run",
        data=DataConfig(images=(images,), workers=0),
        device="cpu",
    )
    write_yaml(replace(config, **changes), images.parent / "settings.yaml")  # type: ignore[arg-type]
    return entry.train([str(images.parent / "settings.yaml")])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ended with."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


FORWARD = "def forward(self, images, drawn=None):\n        found = super().forward(images)\n        "
GAVE = "student 'odd' (package odd-things): its forward at size 32x32 gave "
FAILED = "student 'odd' (package odd-things) failed in forward at size 32x32 (odd_things.py:41): "
SIZES = "student 'odd' (package odd-things): its "
BAD: dict[str, tuple[str, str]] = {
    "raises": (
        FORWARD + "return undefined",
        FAILED + "NameError: name 'undefined' is not defined; mend or uninstall odd-things",
    ),
    "raises in torch": (
        FORWARD + "return self.patch(images[:, :2])",
        FAILED + "RuntimeError: ",
    ),
    "imports": (
        FORWARD + "import nowhere_lib",
        "odd_things.py:41): ModuleNotFoundError: No module named 'nowhere_lib'; mend or uninstall odd-things",
    ),
    "own exception": (
        FORWARD + "raise type('Strange', (Exception,), {})('a\\nb')",
        "(odd_things.py:41): Strange: a\\nb; mend",
    ),
    "nothing": (FORWARD + "return None", GAVE + "a NoneType, wanted radio.types.Features"),
    "a tuple": (FORWARD + "return tuple(found)", GAVE + "a tuple, wanted radio.types.Features"),
    "wide summary": (
        FORWARD + "return found._replace(summary=found.summary.repeat(1, 2))",
        GAVE + "summary of [4, 16], wanted [4, 8] (the grid is 2x2)",
    ),
    "map": (
        FORWARD + "return found._replace(tokens=found.map())",
        GAVE + "tokens of [4, 8, 2, 2], wanted [4, 4, 8]",
    ),
    "other grid": (
        FORWARD + "return found._replace(grid=(2, 3))",
        GAVE + "tokens of [4, 4, 8], wanted [4, 6, 8]",
    ),
    "no grid": (FORWARD + "return found._replace(grid=None)", GAVE + "the grid None, wanted (height, width)"),
    "double": (
        FORWARD + "return found._replace(tokens=found.tokens.double())",
        GAVE + "tokens in torch.float64 on cpu, wanted torch.float32 on cpu",
    ),
    "whole numbers": (
        FORWARD + "return found._replace(summary=found.summary.long())",
        GAVE + "summary in torch.int64 on cpu, wanted torch.float32 on cpu",
    ),
    "an array": (
        FORWARD + "return found._replace(summary=found.summary.detach().numpy())",
        GAVE + "summary that are a ndarray, wanted a tensor",
    ),
    "nearest_size fails": (
        "def nearest_size(self, height, width): return 1 // 0, 1",
        "failed in nearest_size (odd_things.py:39): ZeroDivision",
    ),
    "nearest_size of floats": (
        "def nearest_size(self, height, width): return 32.0, 32.0",
        SIZES + "nearest_size(1, 1) is (32.0, 32.0); wanted",
    ),
    "nearest_size of three": (
        "def nearest_size(self, height, width): return 3, 32, 32",
        SIZES + "nearest_size(1, 1) is (3, 32, 32); wanted",
    ),
    "nearest_size of nothing": (
        "def nearest_size(self, height, width): return 0, 0",
        SIZES + "nearest_size(1, 1) is (0, 0); wanted",
    ),
    "nearest_size moves on": (
        "def nearest_size(self, height, width): return height + 1, width",
        SIZES + "nearest_size(1, 1) is (2, 1), and nearest_size(2, 1) is (3, 1); a size that it takes is the "
        "nearest to itself",
    ),
    "width of text": ("summary_dim = 'x'", SIZES + "summary_dim is 'x'; wanted a whole number above 0"),
    "width 0": ("token_dim = 0", SIZES + "token_dim is 0; wanted"),
    "native size": ("native_size = 32", SIZES + "native_size is 32; wanted (height, width) in pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_student_that_is_wrong_is_one_line_from_both_commands(
    kind: str, install: Callable[..., None], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, said = BAD[kind]
    install(body=body)
    assert evaluate("knn", "arch:odd", images, "--batch-size", "4") == 2
    assert said in told(capsys)
    assert train(images) == 2
    assert said in told(capsys)
    assert not (images.parent / "run" / "state").exists()


def test_what_a_student_draws_is_checked(
    install: Callable[..., None], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(body="def sample_crops(self, batch, generator): return torch.rand(batch - 1)")
    assert train(images) == 2
    assert (
        "student 'odd': its sample_crops gave a Tensor; wanted None, or a tensor with a row for each of 4"
        in told(capsys)
    )


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (
            FORWARD + "return 1 / 0",
            "teacher 'odds' (package odd-things) failed in forward at size 32x32 (odd_things.py:45)",
        ),
        (
            FORWARD + "return tuple(found)",
            "teacher 'odds' (package odd-things): 'odds:x': its forward at size 32x32 gave a tuple",
        ),
        (
            "def nearest_size(self, height, width): return 1.5",
            "teacher 'odds' (package odd-things): 'odds:x': its nearest_size(1, 1) is 1.5",
        ),
        ("def __new__(cls): return [1]", "'odds:x' is not a torch module; make its factory return one"),
    ],
)
def test_a_teacher_that_is_wrong_is_one_line_from_both_commands(
    teacher: str, said: str, install: Callable[..., None], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(teacher=teacher)
    if "__new__" in teacher:
        path = images.parent / "site" / "odd_things.py"
        path.write_text(path.read_text().replace("return Teacher().eval()", "return [1]"))
    assert evaluate("knn", "odds:x", images, "--batch-size", "4") == 2
    assert said in told(capsys)
    assert train(images, student="vit-tiny16", teachers=(TeacherConfig(name="t", model="odds:x"),)) == 2
    assert said in told(capsys)


def test_good_ones_are_distilled_and_scored(install: Callable[..., None], images: Path) -> None:
    install()
    assert train(images, teachers=(TeacherConfig(name="t", model="odds:x"),)) == 0
    for model in ("arch:odd", "odds:x", str(images.parent / "run" / "ckpt.pt")):
        assert evaluate("knn", model, images) == 0


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {},
            "'odd-task' (package odd-things) failed in score (odd_things.py:54): ZeroDivisionError: ",
        ),
        (
            {"score": "raise type('Strange', (Exception,), {})('x')"},
            "(odd_things.py:54): Strange: x; mend or",
        ),
        ({"score": "torch.zeros(2) @ torch.zeros(3)"}, "failed in score (odd_things.py:54): "),
        (
            {"score": "return None"},
            "evaluator 'odd-task' (package odd-things): its evaluate gave NoneType, wanted a Result",
        ),
        (
            {"missing_requirements": "return 1 / 0"},
            "failed in missing_requirements (odd_things.py:50): ZeroDivisionError: ",
        ),
    ],
)
def test_an_evaluator_that_is_wrong_is_one_line_alone_and_among_others(
    parts: dict[str, str],
    said: str,
    install: Callable[..., None],
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(**parts)
    if "missing_requirements" not in parts:
        assert evaluate("odd-task", "scenes:dense", images) == 2
        assert said in told(capsys)
    out = ["--out", str(images.parent / "reports")]
    assert entry.evaluate(["all", "scenes:dense", *out, "--tasks", "odd-task"]) == 1
    assert said in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("field", ["", "('needed', int)"])
def test_a_run_ends_with_a_strangers_evaluator_or_says_before_it_begins_why_not(
    field: str, install: Callable[..., None], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        field=field,
        score="return Result(metrics={'h': Metric(value=41.5)})",
    )
    assert train(images, score=("odd-task",)) == (2 if field else 0)
    said = capsys.readouterr()
    if field:
        assert said.err == (
            "error: odd-task has no default for all of its settings: give --odd-task.needed, or leave it out "
            "of --score and --eval-tasks\n"
        )
        assert not (images.parent / "run").exists()
    else:
        assert "| student      |     41.5 |" in said.out
