"""Exports, opened by the libraries they are for, and compared with the checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from radio import entry
from radio.export import command, layouts
from radio.export.parity import Difference, Written, compare, named_outputs
from radio.hub import load_backbone
from radio.images import evaluation_view
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build, load
from radio.students import ViTDetOptions, ViTOptions, students
from radio.students.timm import TimmOptions
from radio.students.vit import ViT, ViTConfig

_TINY = ViTConfig(
    name="export-test", width=192, depth=2, heads=3, patch=16, native=64, positions=5, mlp_ratio=2.0
)
_ADAPTORS = (
    AdaptorConfig(name="clip", summary_dim=12, token_dim=10, slot=0),
    AdaptorConfig(name="sam", summary_dim=8, token_dim=8, hidden=24, slot=0),
)
SIZES = ((64, 64), (32, 96), (128, 80))


def _tiny(options: ViTDetOptions) -> ViT:
    """A ViT with a linear stem; `schedule` is of no matter without windows."""
    given = {name: options.get(name) for name in ("class_tokens", "registers", "stem", "window", "schedule")}
    shape = {name: value for name, value in given.items() if value is not None}
    return ViT(replace(_TINY, **shape, layer_scale=0.5 if options.registers else None))


students.add("export-test", _tiny)


def _checkpoint(folder: Path, student: str = "export-test", adaptors=_ADAPTORS, **options) -> Path:
    kind = {"export-test": ViTDetOptions}.get(student, ViTOptions)
    if student.startswith("timm:"):
        kind = TimmOptions
    config = ModelConfig(student=student, adaptors=adaptors, options=kind(**options))
    model = build(config, 0, {"resolution": 64} if student == "export-test" else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and norms as after a training
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    path = folder / "model.pt"
    model.save(path)
    return path


def _images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def _expected(model: RadioModel, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(model(images), model.adaptors)


def _check(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert given.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], rtol=0, atol=tolerance, msg=name)


def _export(path: Path, to: str, out: Path) -> None:
    assert entry.export([str(path), "--to", to, str(out)]) == 0


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("options", [{}, {"class_tokens": 2, "registers": 3}, {"class_tokens": 0}])
def test_auto_model_opens_the_folder(options: dict[str, int], tmp_path: Path) -> None:
    adaptors = () if options.get("class_tokens") == 0 else _ADAPTORS
    path = _checkpoint(tmp_path, adaptors=adaptors, **options)
    _export(path, "hf", tmp_path / "hf")
    opened, model = AutoModel.from_pretrained(tmp_path / "hf"), load(path)
    for size in SIZES:
        output = opened(_images(size))
        given = {"summary": output.summary, "tokens": output.last_hidden_state}
        for name, (summary, tokens) in output.adaptors.items():
            given[f"{name}_summary"], given[f"{name}_tokens"] = summary, tokens
        _check(given, _expected(model, _images(size)))
        assert output.grid == (size[0] // 16, size[1] // 16)
    assert AutoConfig.from_pretrained(tmp_path / "hf").metadata == {"resolution": 64}
    assert opened(_images((64, 64)), return_dict=False)[2] == (4, 4)


def test_constants_that_no_file_holds_survive_in_other_dtypes(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, "timm:test_convnext", ())
    _export(path, "hf", tmp_path / "hf")
    opened = AutoModel.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    expected = load(path).student.normalise
    assert opened.model.student.normalise.mean.dtype == torch.bfloat16
    torch.testing.assert_close(opened.model.student.normalise.mean.float(), expected.mean)
    torch.testing.assert_close(opened.model.student.normalise.std.float(), expected.std)


def test_the_image_processor_makes_what_the_model_expects(tmp_path: Path) -> None:
    _export(_checkpoint(tmp_path), "hf", tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(64, 192, (150, 100, 3), dtype=np.uint8)
    values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    view = evaluation_view(image, (64, 64), ratio=1.0)
    torch.testing.assert_close(values, view[None], rtol=0, atol=1.01 / 255)  # it resizes in 8 bits


_FRESH = """
import sys
{imports}
import torch
from transformers import AutoModel
output = AutoModel.from_pretrained(sys.argv[1])(torch.load(sys.argv[2]))
assert "train" not in sys.modules and "evals" not in sys.modules
torch.save([output.summary, output.last_hidden_state], sys.argv[3])
"""


def _python(program: str, *arguments: Path) -> str:
    given = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import radio",
        "import transformers; import radio",
        "from transformers import AutoModel; import radio",
        pytest.param("import radio; from transformers import AutoTokenizer", marks=pytest.mark.slow),
        pytest.param("import radio; from transformers import pipeline, Trainer", marks=pytest.mark.slow),
        pytest.param("import radio; import transformers.modeling_utils", marks=pytest.mark.slow),
        pytest.param("import radio; from transformers import CLIPImageProcessor", marks=pytest.mark.slow),
        pytest.param("import radio; import transformers.models.auto.auto_factory", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_opens_it_in_both_orders_of_imports(imports: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    build(ModelConfig(student="vit-tiny12"), 0).save(path)
    _export(path, "hf", tmp_path / "hf")
    torch.save(_images((96, 48)), tmp_path / "images.pt")
    program = _FRESH.format(imports=imports)
    _python(program, tmp_path / "hf", tmp_path / "images.pt", tmp_path / "outputs.pt")
    features = load(path)(_images((96, 48)))
    for given, expected in zip(torch.load(tmp_path / "outputs.pt"), features[:2], strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_importing_radio_imports_neither_torch_nor_transformers() -> None:
    loaded = "print({'torch', 'transformers', 'radio.export.hf_model'} & set(sys.modules))"
    assert _python(f"import sys, radio; {loaded}").strip() == "set()"
    assert _python(f"import sys, radio, transformers; {loaded}").strip() == "{'transformers'}"


_WINDOWED = {"window": 2, "schedule": 1}  # one global block of two


@pytest.mark.parametrize("options", [{}, {"class_tokens": 2, "registers": 3}], ids=str)
def test_the_released_layout_is_read_as_a_released_model(options: dict[str, int], tmp_path: Path) -> None:
    slots = {"clip": 0, "sam": options.get("class_tokens", 1) - 1}
    adaptors = tuple(replace(adaptor, slot=slots[adaptor.name]) for adaptor in _ADAPTORS)
    path = _checkpoint(tmp_path, adaptors=adaptors, **options)
    _export(path, "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "radio_layout.safetensors"
    released, model = load_backbone(f"radio:{file}"), load(path)
    for size in SIZES:
        _check(
            named_outputs(released(_images(size)), released.adaptors), _expected(model, _images(size)), 2e-5
        )
    assert released.native_size == (64, 64)


def test_timm_reads_the_released_layout_up_to_the_final_norm(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, class_tokens=2, registers=3)
    _export(path, "hf", tmp_path / "hf")
    network = timm.create_model(
        "naflexvit_base_patch16_radio_v3",
        num_classes=0,
        embed_dim=192,
        depth=2,
        num_heads=3,
        mlp_ratio=2.0,
        init_values=0.5,
        reg_tokens=4,
        pos_embed_grid_size=(5, 5),
        pos_embed_align_corners=False,
    ).eval()
    tensors = load_file(tmp_path / "hf" / "radio_layout.safetensors")
    renamed = timm.models.naflexvit.checkpoint_filter_fn(tensors, network)
    network.load_state_dict(renamed, strict=True)
    model = load(path)
    student = model.student
    for size in SIZES:
        with torch.no_grad():
            tokens = student.norm(network.forward_features(student.normalise(_images(size))))
        expected = _expected(model, _images(size))
        torch.testing.assert_close(tokens[:, 5:], expected["tokens"], rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, :2].flatten(1), expected["summary"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stem": "conv"}, "linear stem"),
        ({"class_tokens": 0}, "mean of the tokens"),
        (_WINDOWED, "no place for 1 global blocks"),
    ],
)
def test_what_the_released_layout_cannot_express_is_named(options, reason, tmp_path: Path, capsys) -> None:
    _export(_checkpoint(tmp_path, adaptors=(), **options), "hf", tmp_path / "hf")
    assert reason in capsys.readouterr().out
    assert not (tmp_path / "hf" / "radio_layout.safetensors").exists()


def test_a_head_that_reads_several_class_tokens_is_left_out_of_the_released_layout(
    tmp_path: Path, capsys
) -> None:
    adaptors = (_ADAPTORS[0], replace(_ADAPTORS[1], slot=None))
    _export(_checkpoint(tmp_path, adaptors=adaptors, class_tokens=2), "hf", tmp_path / "hf")
    assert "without the adaptor sam" in capsys.readouterr().out
    released = load_backbone(f"radio:{tmp_path / 'hf' / 'radio_layout.safetensors'}")
    assert list(released.adaptors) == ["clip"]


@pytest.mark.parametrize(
    ("options", "size"), [({}, (48, 80)), (_WINDOWED, (64, 96))], ids=["global", "windows"]
)
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_graphs_take_any_size_and_batch(to: str, options, size: tuple[int, int], tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, **options)
    out = tmp_path / f"graph.{to}"
    _export(path, to, out)
    model = load(path)
    if to == "onnx":
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
    else:
        graph = torch.export.load(out).module()
    for shape in ((64, 64), size, (128, 64)):
        for batch in (1, 4):
            images = _images(shape, batch)
            if to == "onnx":
                values = session.run(None, {"images": images.numpy()})
                given = {n: torch.from_numpy(value) for n, value in zip(names, values, strict=True)}
            else:
                given = graph(images)
            _check(given, _expected(model, images), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("e-radio-tiny", "96x96 px alone, as its attention windows depend"),
        ("timm:mvitv2_tiny", "224x224 px alone, as it is built for that"),
        ("timm:tf_mobilenetv3_small_minimal_100", "224x224 px alone, as its padding depends"),
    ],
)
def test_a_model_of_one_size_is_exported_for_that_size(
    student: str, words: str, to: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "model.pt"
    build(ModelConfig(student=student, adaptors=()), 0).save(path)
    _export(path, to, tmp_path / f"graph.{to}")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("student", "options"),
    [
        ("export-test", {}),
        ("export-test", {"class_tokens": 3, "registers": 2}),
        ("export-test", {"class_tokens": 0}),
        ("export-test", {"class_tokens": 0, "registers": 2}),
        ("timm:test_convnext", {}),
        ("timm:test_vit", {"image_size": 128}),
    ],
    ids=str,
)
def test_timm_opens_the_weights_by_the_printed_call(
    student: str, options: dict[str, int], tmp_path: Path, capsys
) -> None:
    path = _checkpoint(tmp_path, student, (), **options)
    out = tmp_path / "weights.safetensors"
    _export(path, "timm", out)
    call = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("timm.create_model"))
    network = eval(call, {"timm": timm}).eval()  # noqa: S307 (our own line)
    model = load(path)
    images = _images(model.native_size)
    features = model(images)
    with torch.no_grad():
        last = network.forward_features(model.student.normalise(images))
        summary = network(model.student.normalise(images))
    if (classes := options.get("class_tokens", 1)) > 1:
        summary = last[:, :classes].flatten(1)
    torch.testing.assert_close(summary, features.summary, rtol=0, atol=1e-5)
    if last.ndim == 3:
        torch.testing.assert_close(last[:, network.num_prefix_tokens :], features.tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "options", "reason"),
    [
        ("export-test", {"stem": "conv", **_WINDOWED}, "no convolutional stem.*, and no attention"),
        ("timm:test_convnext", {"upsample": True}, "no neck"),
    ],
)
def test_what_timm_lacks_is_one_error(student, options, reason, tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, student, (), **options)
    with pytest.raises(layouts.ConfigError, match=reason):
        layouts.write_timm(load(path), tmp_path / "weights.safetensors")


def test_an_e_radio_has_no_counterpart_in_timm(tmp_path: Path, capsys) -> None:
    path = tmp_path / "model.pt"
    build(ModelConfig(student="e-radio-tiny"), 0).save(path)
    assert entry.export([str(path), "--to", "timm", str(tmp_path / "x.safetensors")]) == 2
    assert "timm has no such architecture; take --to hf" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(("to", "out"), [("timm", "x.safetensors"), ("hf", "x")])
def test_another_result_than_the_checkpoints_leaves_nothing(
    to: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path = _checkpoint(tmp_path, adaptors=())
    right = command.compare

    def wrong(expected, written: Written) -> list[Difference]:
        return right(lambda images: {k: v * 1.01 for k, v in expected(images).items()}, written)

    monkeypatch.setattr(command, "compare", wrong)
    assert entry.export([str(path), "--to", to, str(tmp_path / out)]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("given", "close"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 3) * 1.00005, True),
        (torch.ones(2, 3) * 1.001, False),
        (torch.ones(2, 3) * float("nan"), False),
        (torch.ones(2, 2), False),
    ],
)
def test_only_close_values_of_the_same_shape_pass(given: Tensor, close: bool) -> None:
    written = Written({"file": lambda images: {"summary": given}}, [(4, 4)], [])
    (row,) = compare(lambda images: {"summary": torch.ones(2, 3), "tokens": torch.ones(1)}, written)
    assert (row.file, row.output, row.value, row.close) == ("file", "summary", 1.0, close)


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("there.onnx", "onnx", "exists already"),
        ("folder", "hf", "exists already"),
        ("missing/x.pt2", "pt2", "its folder does not exist"),
        ("missing/x", "hf", "its folder does not exist"),
        ("there.onnx/x", "hf", "its folder does not exist"),
        ("x.pt", "pt2", "ends in .pt2"),
        ("x", "timm", "ends in .safetensors"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    out: str, to: str, words: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "there.onnx").touch()
    (tmp_path / "folder").mkdir()
    assert entry.export([str(tmp_path / "no.pt"), "--to", to, str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys) -> None:
    for name, content in (("text.pt", b"text"), ("absent.pt", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert entry.export([str(tmp_path / name), "--to", "pt2", str(tmp_path / "x.pt2")]) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize(
    ("to", "out", "library"), [("onnx", "x.onnx", "onnxscript"), ("hf", "x", "transformers")]
)
def test_a_missing_library_names_the_extra(
    to: str, out: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert entry.export([str(tmp_path / "no.pt"), "--to", to, str(tmp_path / out)]) == 2
    assert (
        f'{library} is not installed; get it with: pip install "am-radio[export]"' in capsys.readouterr().err
    )


def test_an_unknown_target_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry.export([str(tmp_path / "no.pt"), "--to", "tflite", str(tmp_path / "x")])
    assert stopped.value.code == 2
    assert "onnx" in capsys.readouterr().err
