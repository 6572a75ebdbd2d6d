"""Checkpoint files: bit for bit back, or one clear error; never code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from radio import checkpoint
from radio.errors import CheckpointError

ENDINGS = [".pt", ".safetensors"]
METADATA_FILE = {"model": {"student": "vit-tiny12"}, "note": "ünï", "steps": 3}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "a.weight": torch.randn(4, 6, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "transposed": torch.randn(5, 2, generator=generator).T,
        "view": torch.randn(10, generator=generator)[::3],
        "odd": odd,
        "count": torch.tensor(7),
        "empty": torch.zeros(1, 0, 4),
        "flags": torch.tensor([True, False]),
    }


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, tensors, ending):
    path = tmp_path / "new" / f"ckpt{ending}"
    sha = checkpoint.save(path, tensors, METADATA_FILE)
    found = checkpoint.load(path)
    assert found.metadata == METADATA_FILE and found.sha256 == sha and len(sha) == 64
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        again = found.tensors[name]
        assert again.dtype == tensor.dtype and again.shape == tensor.shape
        assert _bits(again) == _bits(tensor), name


@pytest.mark.parametrize("ending", ENDINGS)
def test_equal_content_makes_equal_bytes(tmp_path, tensors, ending):
    paths = [tmp_path / f"{i}{ending}" for i in range(8)]
    for path in paths:
        checkpoint.save(
            path, {name: t.clone() for name, t in tensors.items()}, dict(reversed(METADATA_FILE.items()))
        )
    assert len({path.read_bytes() for path in paths}) == 1


def test_both_endings_have_the_same_hash_and_any_change_another(tmp_path, tensors):
    shas = {checkpoint.save(tmp_path / f"ckpt{ending}", tensors, METADATA_FILE) for ending in ENDINGS}
    assert len(shas) == 1
    changed = [
        ({**tensors, "odd": tensors["odd"].abs()}, METADATA_FILE),  # only the sign of a zero
        ({**tensors, "half": tensors["half"].view(torch.int16)}, METADATA_FILE),
        ({**tensors, "a.weight": tensors["a.weight"].reshape(6, 4)}, METADATA_FILE),
        ({("b" if k == "half" else k): v for k, v in tensors.items()}, METADATA_FILE),
        (tensors, {**METADATA_FILE, "steps": 4}),
    ]
    shas |= {checkpoint.save(tmp_path / "other.pt", *content) for content in changed}
    assert len(shas) == 1 + len(changed)


@pytest.mark.parametrize("what", ["tensor", "metadata"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_altered_content_is_refused(tmp_path, tensors, ending, what):
    path = tmp_path / f"ckpt{ending}"
    sha = checkpoint.save(path, tensors, METADATA_FILE)
    text = json.dumps(
        {"format": checkpoint.FORMAT, **METADATA_FILE, **({"steps": 4} if what == "metadata" else {})},
        sort_keys=True,
    )
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if what == "tensor":
        kept["a.weight"].view(-1)[5] += 1e-6
    if ending == ".pt":
        torch.save({"metadata": text, "sha256": sha, "tensors": kept}, path)
    else:
        path.write_bytes(safetensors.torch.save(kept, metadata={"metadata": text, "sha256": sha}))
    with pytest.raises(CheckpointError, match=r"does not match its sha256; it was altered"):
        checkpoint.load(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated_files_are_refused_wherever_they_end(tmp_path, tensors, ending):
    path = tmp_path / f"ckpt{ending}"
    checkpoint.save(path, tensors, METADATA_FILE)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="ckpt"):
            checkpoint.load(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_byte_can_be_changed_unnoticed(tmp_path, ending):
    path = tmp_path / f"ckpt{ending}"
    tensors = {"w": torch.randn(6, generator=torch.Generator().manual_seed(0))}
    checkpoint.save(path, tensors, METADATA_FILE)
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            continue
        assert found.metadata == METADATA_FILE and torch.equal(
            found.tensors["w"], tensors["w"]
        )  # e.g. a time stamp


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_that_are_no_torch_files_are_refused(tmp_path, ending):
    path, rng = tmp_path / f"ckpt{ending}", random.Random(0)
    texts = [
        bytes([first]) + b"ello there, this is a text\n" for first in range(256)
    ]  # what opcodes make of it
    noise = [rng.randbytes(rng.randrange(80)) for _ in range(300)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "x")
    for content in (*texts, *noise, archive.getvalue(), pickle.dumps({}), pickle.dumps([1, 2])):
        path.write_bytes(content)
        for load in (checkpoint.load, checkpoint.load_tensors):
            with pytest.raises(CheckpointError, match="ckpt"):
                load(path)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(2)},
        3,
        [torch.zeros(1)],
        {"metadata": 1, "sha256": 2, "tensors": 3},
        {"metadata": "{}", "sha256": "", "tensors": {"a": 3}},
        {"metadata": "{}", "sha256": "", "tensors": {3: torch.zeros(1)}},
    ],
)
def test_a_foreign_torch_file_is_refused_with_a_way_out(tmp_path, content):
    path = tmp_path / "theirs.pt"
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"not an am-radio checkpoint; .* as in dinov2:vitb14@.*theirs\.pt"
    ):
        checkpoint.load(path)


def test_safetensors_of_others_and_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="holds tensors but no am-radio metadata"):
        checkpoint.load(path)
    text = json.dumps({"format": "am-radio/99"})
    sha = checkpoint.digest({}, text)
    path.write_bytes(safetensors.torch.save({}, metadata={"metadata": text, "sha256": sha}))
    with pytest.raises(CheckpointError, match="not of the format am-radio/1"):
        checkpoint.load(path)


@pytest.mark.parametrize("style", ["pickle", "archive", "module"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, style):
    trace, path = tmp_path / "it-ran", tmp_path / "bomb.pt"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    if style == "pickle":
        path.write_bytes(pickle.dumps({"metadata": Bomb(), "sha256": "", "tensors": {}}, protocol=2))
    elif style == "archive":
        torch.save({"metadata": "{}", "sha256": "", "tensors": {"a": Bomb()}}, path)
    else:
        torch.save(nn.Linear(2, 2), path)
    for load in (checkpoint.load, checkpoint.load_tensors):
        with pytest.raises(CheckpointError, match=r"bomb\.pt: reading it could run code .*; nothing was run"):
            load(path)
    assert not trace.exists()
    if style != "module":  # the payload is a working one
        torch.load(path, weights_only=False) if style == "archive" else pickle.loads(path.read_bytes())  # noqa: S301
        assert trace.exists()


def test_absent_files_folders_and_wrong_endings(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint file"):
            checkpoint.load(path)
        with pytest.raises(CheckpointError, match="no such weights file"):
            checkpoint.load_tensors(path)
    with pytest.raises(CheckpointError, match=r"ckpt\.bin: a checkpoint ends in \.pt or \.safetensors"):
        checkpoint.save(tmp_path / "ckpt.bin", {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, tensors, monkeypatch, ending):
    path = tmp_path / f"ckpt{ending}"
    checkpoint.save(path, tensors, METADATA_FILE)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {}, {})
    assert checkpoint.load(path).metadata == METADATA_FILE
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_other_peoples_state_dicts_are_unwrapped(tmp_path, wrap):
    path = tmp_path / "theirs.pth"
    state = {"a": torch.arange(3.0), "step": 3}
    torch.save(state if wrap is None else {wrap: state, "epoch": 1}, path)
    found = checkpoint.load_tensors(path)
    assert list(found) == ["a"] and torch.equal(found["a"], state["a"])
    torch.save({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match="holds no tensors; wanted a state dict"):
        checkpoint.load_tensors(path)
    plain = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"a": state["a"]}, plain)
    assert torch.equal(checkpoint.load_tensors(plain)["a"], state["a"])


def test_a_state_that_does_not_fit_lists_what_is_wrong():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.LayerNorm(4))
    state = {name: torch.full_like(tensor, 2.0) for name, tensor in module.state_dict().items()}
    wrong = {**state, "0.weight": torch.zeros(3, 9), "extra": torch.zeros(1)}
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        del wrong[name]
    found = (
        r"missing: 0\.bias, 1\.weight, 1\.bias and 1 more; unexpected: extra; "
        r"misshapen: 0\.weight \(3, 9\) instead of \(3, 2\)"
    )
    with pytest.raises(CheckpointError, match=f"^file: these are not the weights .*: {found}$"):
        checkpoint.load_state(module, wrong, "file")
    assert not (module[0].weight == 0).any()  # nothing was loaded
    checkpoint.load_state(module, state, "file")
    assert all((tensor == 2.0).all() for tensor in module.state_dict().values())
    with torch.device("meta"):
        empty = nn.Linear(2, 3)
    checkpoint.load_state(empty, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "file")
    assert not empty.weight.is_meta and empty.weight.sum() == 6


def test_the_digest_is_of_names_types_shapes_and_bytes_in_any_order():
    one, two = torch.arange(4.0), torch.ones(2, dtype=torch.bfloat16)
    assert checkpoint.digest({"a": one, "b": two}) == checkpoint.digest({"b": two, "a": one.clone()})
    values = (one, one.view(2, 2), one.view(torch.int32), one + 1)
    others = [{}, {"b": one}, *({"a": value} for value in values)]
    assert len({checkpoint.digest(other) for other in others}) == len(others)
    assert checkpoint.digest({}, "x") != checkpoint.digest({}, "y")


def test_text_that_is_no_text_is_an_error(tmp_path, tensors):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, tensors, METADATA_FILE)
    whole = torch.load(path)
    torch.save({**whole, "metadata": '{"a": "\ud800"}'}, path)
    with pytest.raises(CheckpointError, match="its metadata holds half a character"):
        checkpoint.load(path)
    torch.save({**whole, "tensors": {**whole["tensors"], "x\udfff": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match=r"the name x\\udfff holds half a character"):
        checkpoint.load(path)


@pytest.mark.parametrize("method", ["detach", "isfinite", "numel", "element_size", "is_conj", "float"])
def test_what_hangs_on_a_parameter_stands_before_none_of_its_methods(tmp_path, method):
    weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    sha = checkpoint.digest({"weight": weight}, "{}")
    weight.__dict__[method] = 5
    torch.save({"weight": weight}, tmp_path / "foreign.pt")
    torch.save({"metadata": "{}", "sha256": sha, "tensors": {"weight": weight}}, tmp_path / "ckpt.pt")
    found = checkpoint.load_tensors(tmp_path / "foreign.pt")
    linear = nn.Linear(2, 2, bias=False)
    checkpoint.load_state(linear, found, "foreign")
    assert linear.weight.equal(torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="not of the format"):  # the hash fits
        checkpoint.load(tmp_path / "ckpt.pt")


def test_packed_numbers_are_no_weights(tmp_path):
    packed = torch.empty(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"weight": packed}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"weight is a packed \(float4_e2m1fn_x2\) tensor"):
        checkpoint.load_tensors(tmp_path / "w.pt")
