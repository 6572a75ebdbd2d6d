"""Write an export, read it back by its own library, compare it with the checkpoint, and publish it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import to_plain
from ..errors import ConfigError, one_line, require, shown
from ..hub import load_backbone
from ..io import make_folder, staged
from ..model import RadioModel, load
from ..students.eradio import ERadio
from .cli import Target
from .layouts import released_layout, write_timm
from .parity import BATCHES, TOLERANCE, Reader, Written, check_sizes, compare, make_table, named_outputs

# Letters: B batch, C summary width, T tokens, D token width.

_RELEASED = "radio_layout.safetensors"
_LEAST = 2  # steps along each side of an image: torch.export takes a single one for a constant


class _DifferentError(Exception):
    """What was written does not compute what the checkpoint does."""


def export(checkpoint: Path, target: Target, out: Path, console: Console) -> int:
    """Export a checkpoint to `out`, which does not exist yet; return the exit code.

    Returns:
        0, or 1 if what was written differs from the checkpoint: then nothing is left at `out`.

    Raises:
        CheckpointError: no such checkpoint, or a foreign or damaged one.
        ConfigError: the target has no counterpart for the model.
        MissingExtraError: the target's library is not installed.
    """
    write = _writer(target)
    model = load(checkpoint)
    fill = partial(_write_and_compare, write, model, out, console)
    try:
        if target == "hf":
            if not make_folder(out, fill):
                raise ConfigError(f"OUT {shown(out)}: another process has made it; choose another name")
        else:
            with staged(out.absolute().parent) as folder:
                fill(folder / out.name)
    except _DifferentError:
        console.print("its outputs are not the checkpoint's: nothing was written", style="red")
        return 1
    console.print(escape(str(out)), soft_wrap=True)
    return 0


def _writer(target: Target) -> Callable[[RadioModel, Path], Written]:
    """Return the function that writes a target.

    Raises:
        MissingExtraError: one of its libraries is not installed.
    """
    if target == "hf":
        require("transformers", extra="export")
    if target == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            require(library, extra="export")
    return {"hf": write_hf, "onnx": write_onnx, "timm": write_timm, "pt2": write_pt2}[target]


def _write_and_compare(
    write: Callable[[RadioModel, Path], Written], model: RadioModel, out: Path, console: Console, path: Path
) -> None:
    with torch.no_grad():
        written = write(model, path)
        rows = compare(Outputs(model).eval(), written)
    for note in written.notes:
        console.print(escape(note.replace(str(path), str(out))), soft_wrap=True)
    console.print(make_table(rows))
    sizes = ", ".join(f"{height}x{width}" for height, width in written.sizes)
    console.print(
        f"compared on random images of {sizes} px, in batches of {' and '.join(map(str, BATCHES))}; "
        f"tolerance: {TOLERANCE:g} of the largest value",
        soft_wrap=True,
    )
    if not all(row.close for row in rows):
        raise _DifferentError


class Outputs(nn.Module):
    """A model whose call returns all its outputs by name, those of its adaptors too."""

    def __init__(self, model: RadioModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map RGB [B, 3, h, w] in [0, 1] to `summary` [B, C], `tokens` [B, T, D], and the adaptors' ones."""
        return named_outputs(self.model(images), self.model.adaptors)


def write_hf(model: RadioModel, path: Path) -> Written:
    """Write a folder for `AutoModel` and `AutoImageProcessor`, and read it back by them.

    Where the layout of the released RADIO models can express the student, the folder also holds that.
    """
    from transformers import AutoModel, CLIPImageProcessor, logging

    from .hf_config import RadioVisionConfig
    from .hf_model import RadioVisionModel

    notes = [
        f'import radio, then transformers.AutoModel.from_pretrained("{path}")',
        "pixel_values are RGB in [0, 1], as its image processor makes them; the model normalises them itself",
    ]
    tensors, entries, layout_notes = _released(model)
    if tensors:
        save_file(tensors, path / _RELEASED, {"format": "pt"})
    logging.disable_progress_bar()
    metadata = {key: model.metadata[key] for key in ("resolution", "teachers") if key in model.metadata}
    wrapped = RadioVisionModel(RadioVisionConfig(model=to_plain(model.config), metadata=metadata, **entries))
    wrapped.model.load_state_dict(model.state_dict())
    wrapped.save_pretrained(path)
    height, width = model.native_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": max(height, width)},
        crop_size={"height": height, "width": width},
        do_normalize=False,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    processor.save_pretrained(path)
    opened = AutoModel.from_pretrained(path)
    readers: dict[str, Reader] = {"model.safetensors": partial(_read_hf, opened)}
    if tensors:
        released = load_backbone(f"radio:{path / _RELEASED}", window=model.window)
        readers[_RELEASED] = lambda images: named_outputs(released(images), released.adaptors)
    return Written(readers, check_sizes(model), [*notes, *layout_notes])


def _released(model: RadioModel) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the released layout of a model, its entries of config.json, and notes; empty if it has none."""
    try:
        tensors, entries, notes = released_layout(model)
    except ConfigError as error:
        return {}, {}, [f"without {_RELEASED}: {error}"]
    first = f"{_RELEASED} has the names of the released RADIO models; timm reads it without the final norm"
    if model.window is not None:
        notes.insert(0, f"it does not hold the attention window: choose {model.window} when you open it")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return tensors, entries, [first, *(f"{_RELEASED}: {note}" for note in notes)]


def _read_hf(opened: Any, images: Tensor) -> dict[str, Tensor]:
    output = opened(pixel_values=images)
    outputs = {"summary": output.summary, "tokens": output.last_hidden_state}
    for name, (summary, tokens) in output.adaptors.items():
        outputs[f"{name}_summary"], outputs[f"{name}_tokens"] = summary, tokens
    return outputs


def write_pt2(model: RadioModel, path: Path) -> Written:
    """Write the graph of torch.export to a file, and read it back.

    Raises:
        ConfigError: torch.export cannot trace the model.
    """
    program, sizes, notes = _trace(model)
    torch.export.save(program, path)
    read: Reader = torch.export.load(path).module()
    return Written({path.name: read}, sizes, [f'torch.export.load("{path}").module()', *notes])


def write_onnx(model: RadioModel, path: Path) -> Written:
    """Write the graph for ONNX Runtime to a file, and read it back.

    Raises:
        ConfigError: torch.export cannot trace the model, or ONNX lacks one of its operations.
    """
    import onnxruntime

    program, sizes, notes = _trace(model)
    names = list(named_outputs(model(torch.zeros(1, 3, *sizes[0])), model.adaptors))
    try:
        graph = torch.onnx.export(program, input_names=["images"], output_names=names, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"{model.name}: {_reason(error)}; take another --to") from error
    assert graph is not None
    graph.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def read(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return Written({path.name: read}, sizes, [f'onnxruntime.InferenceSession("{path}")', *notes])


def _trace(model: RadioModel) -> tuple[torch.export.ExportedProgram, list[tuple[int, int]], list[str]]:
    """Trace all outputs, for any batch and, where that works, any size.

    Returns:
        The program, the sizes to compare it at, and what it cannot express.

    Raises:
        ConfigError: torch.export cannot trace the model.
    """
    notes = ["input: RGB images in [0, 1], in batches of any size; it normalises them itself"]
    if model.window is not None:
        notes.append(f"its attention windows keep their side of {model.window} tokens")
    reason = _needs_one_size(model)
    if reason is None:
        try:
            program, sizes, step = _trace_sizes(model)
        except Exception as error:  # noqa: BLE001 (torch may raise anything about an operation)
            reason = f"torch.export cannot trace others ({_reason(error)})"
        else:
            multiples = [f"multiples of {side} px from {_LEAST * side} on" for side in step]
            notes.append(f"height: {multiples[0]}; width: {multiples[1]}")
            return program, sizes, notes
    height, width = model.native_size
    notes.append(f"size: {height}x{width} px alone, as {reason}")
    images = torch.zeros(2, 3, height, width)
    try:
        program = torch.export.export(Outputs(model).eval(), (images,), dynamic_shapes=({0: _BATCH},))
    except Exception as error:
        raise ConfigError(
            f"{model.name}: torch.export cannot trace it ({_reason(error)}); take --to hf"
        ) from error
    return program, [(height, width)], notes


_BATCH = torch.export.Dim("batch")


def _needs_one_size(model: RadioModel) -> str | None:
    """Return why a graph of the model is for one size; None if it may be for all.

    What torch.export traces for all sizes only in many minutes counts as well.
    """
    if model.fixed_size:
        return "it is built for that"
    if isinstance(model.student, ERadio):
        return "its attention windows depend on the size"
    if any(type(module).__name__.endswith("Same") for module in model.modules()):  # timm's layers
        return "its padding depends on the size"
    return None


def _trace_sizes(
    model: RadioModel,
) -> tuple[torch.export.ExportedProgram, list[tuple[int, int]], tuple[int, int]]:
    """Trace the model for all multiples of its smallest size, and run it at three of them.

    Returns:
        The program, the sizes that it ran at, and the smallest size.
    """
    step = model.nearest_size(1, 1)
    sizes = check_sizes(model, (_LEAST * step[0], _LEAST * step[1]))
    height, width = sizes[0]
    shapes = {0: _BATCH, 2: step[0] * torch.export.Dim("rows"), 3: step[1] * torch.export.Dim("columns")}
    images = torch.zeros(2, 3, height, width + step[1])  # another width, which torch.export must not equate
    program = torch.export.export(Outputs(model).eval(), (images,), dynamic_shapes=(shapes,))
    for size in sizes:  # a graph may have conditions on the size
        program.module()(torch.zeros(1, 3, *size))
    return program, sizes, step


def _reason(error: BaseException) -> str:
    return " ".join((one_line(error) or str(error)).split())[:300]
