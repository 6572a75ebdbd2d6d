"""Files of weights that others made: the right weights, or one error before any memory is taken."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from radio import checkpoint
from radio import model as models
from radio.archive import read_torch
from radio.checkpoint import load_tensors, teachers_on
from radio.config import to_plain
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.hub import load_backbone
from radio.model import AdaptorConfig, ModelConfig, build

CLIP = AdaptorConfig(name="clip", summary_dim=5, token_dim=7)
CONFIG = ModelConfig(student="vit-tiny12", adaptors=(CLIP,))
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(2.0)}


def write(path: Path, text: str, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint whose metadata is any text, with the hash that belongs to it."""
    plain = {name: tensor for name, tensor in tensors.items() if checkpoint_can_hash(tensor)}
    sha = checkpoint.digest(plain, text) if len(plain) == len(tensors) else "0" * 64
    torch.save({"metadata": text, "sha256": sha, "tensors": tensors}, path)
    return path


def checkpoint_can_hash(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and 0 not in tensor.stride()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return build(CONFIG, 0).state_dict()


def metadata(**changes: Any) -> str:
    return json.dumps({"format": checkpoint.FORMAT, "model": to_plain(CONFIG), **changes})


def changed(**options: Any) -> dict[str, Any]:
    plain = to_plain(CONFIG)
    plain["options"].update(options)
    return plain


def with_adaptor(**values: Any) -> dict[str, Any]:
    plain = to_plain(CONFIG)
    plain["adaptors"][0].update(values)
    return plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not JSON", "its metadata: is not JSON"),
        ("[1]", "its metadata is a list; wanted an object"),
        ("3", "its metadata is a int"),
        ("null", "its metadata is a NoneType"),
        ("[" * 100_000, "its metadata: is nested too deeply"),
        ('{"format": ' + "1" * 5000 + "}", "its metadata: is not JSON"),
        (
            metadata(resolution=1_000_000),
            r"resolution: input should be less than or equal to 16384, got 1000000",
        ),
        (metadata(resolution=float("inf")), "Infinity, which JSON does not have"),
        (metadata(note=1).replace('"note": 1', '"note": 1e999'), "its metadata cannot be written again"),
        (metadata(resolution="x"), "resolution: input should be a valid integer, got 'x'"),
        (metadata(teachers="x"), "teachers: input should be a valid list, got 'x'"),
        (metadata(teachers={}), "teachers: input should be a valid list"),
        (metadata(teachers=[1]), r"teachers\[0\]: input should be a valid dictionary, got 1"),
        (metadata(teachers=[{}]), r"teachers\[0\]\.name: field required"),
        (
            metadata(teachers=[{"name": 1, "model": 2, "fingerprint": 3}]),
            r"teachers\[0\]\.name: .*string, got 1",
        ),
        (metadata(data="x"), "data: input should be a valid dictionary, got 'x'"),
        (metadata(data=5), "data: .*dictionary, got 5"),
        (metadata(data=[1]), "data: .*dictionary"),
        (metadata(data={"sources": "x"}), r"data\.sources: input should be a valid list"),
        (metadata(data={"sources": [1]}), r"data\.sources\[0\]: .*dictionary, got 1"),
        (metadata(data={"sources": [{"path": "a\0b"}]}), r"data\.sources\[0\]\.path: .* holds a NUL"),
    ],
)
def test_a_card_of_another_shape_is_one_error_that_names_the_place(tmp_path, weights, text, message):
    path = write(tmp_path / "ckpt.pt", text, weights)
    with pytest.raises(CheckpointError, match=rf"ckpt\.pt: .*{message}") as caught:
        models.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (changed(class_tokens=10**9), r"model\.options\.class_tokens: 1000000000 is out of bounds"),
        (changed(registers=10**12), r"model\.options\.registers: 1000000000000 is out of bounds"),
        (changed(registers=-1), r"model\.options\.registers: -1 is out of bounds"),
        (changed(image_size=10**9), r"model\.options\.image_size'"),
        (with_adaptor(hidden=10**9), r"model\.adaptors\[0\]\.hidden: 1000000000 is out of bounds"),
        (with_adaptor(summary_dim=-3), r"model\.adaptors\[0\]\.summary_dim: -3 is out of bounds"),
        (with_adaptor(hidden=2**20), r"misshapen: .*128\) instead of \(1048576, 128\)"),
        (changed(registers=1000), r"misshapen: student\.prefix \(1, 1, 128\) instead of \(1, 1001, 128\)"),
        (
            {**to_plain(CONFIG), "adaptors": to_plain((CLIP,)) * 100_000},
            "model.adaptors: list should have at most 256 items",
        ),
        ({**to_plain(CONFIG), "adaptors": to_plain((CLIP,)) * 250}, "names 250 adaptors, and the file has"),
    ],
)
def test_a_model_that_its_file_does_not_hold_is_never_built(tmp_path, weights, monkeypatch, model, message):
    path = write(tmp_path / "ckpt.pt", metadata(model=model), weights)
    monkeypatch.setattr(models, "build", lambda *_: pytest.fail("it was built"))
    with pytest.raises((CheckpointError, ConfigError), match=rf"ckpt\.pt: .*{message}"):
        models.load(path)


def test_teachers_in_the_metadata_may_name_no_weights():
    whole = {"name": "clip", "model": "scenes:clip", "fingerprint": "0", "more": [1]}
    assert teachers_on({"teachers": [whole, {"name": "sam"}]}, "m") == [whole, {"name": "sam"}]
    assert teachers_on({}, "m") == teachers_on({"teachers": None}, "m") == []
    with pytest.raises(CheckpointError, match=r"^m: the teachers in its metadata: .*name"):
        teachers_on({"teachers": [{"model": "scenes:clip"}]}, "m")
    with pytest.raises(CheckpointError, match="input should be a valid list"):
        teachers_on({"teachers": "x"}, "m")


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.eye(3).to_sparse(), "w is a sparse_coo tensor; wanted dense ones"),
        ("csr", "w is a sparse_csr tensor"),
        (torch.zeros(3, device="meta"), "w is a meta tensor"),
        (torch.zeros(1).expand(10**12), "has [0-9]+ bytes, and its tensors would take 4000000000000"),
        (torch.zeros(1).expand(10**10), r"the largest w of shape \(10000000000,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("load", [checkpoint.load, load_tensors])
def test_tensors_without_their_values_are_refused(tmp_path, odd, message, load):
    path = tmp_path / "ckpt.pt"
    if isinstance(odd, str):
        odd = torch.eye(3).to_sparse_csr()
    whole = {"w": odd} if load is load_tensors else {"metadata": "{}", "sha256": "", "tensors": {"w": odd}}
    torch.save(whole, path)
    with pytest.raises(CheckpointError, match=rf"ckpt\.pt: .*{message}"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
def test_weights_of_another_kind_are_refused_and_not_cast(tmp_path, weights, dtype):
    path = write(
        tmp_path / "ckpt.pt", metadata(), {**weights, "student.norm.bias": torch.ones(128, dtype=dtype)}
    )
    said = str(dtype).removeprefix("torch.")
    with pytest.raises(
        CheckpointError, match=rf"of another kind: student\.norm\.bias {said} instead of float32"
    ):
        models.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_of_nan_is_told_when_it_is_loaded(tmp_path, weights, value):
    broken = {**weights, "student.norm.bias": torch.full((128,), value)}
    path = write(tmp_path / "ckpt.pt", metadata(), broken)
    with pytest.raises(
        CheckpointError, match=r"1 of its \d+ tensors hold NaN or infinities, the first is student"
    ):
        models.load(path)
    assert models.load_untrained(path, 0)(torch.zeros(1, 3, 48, 48)).tokens.isfinite().all()


def test_shared_storage_and_float8_are_taken(tmp_path):
    shared = torch.arange(4.0)
    path = tmp_path / "w.pt"
    torch.save({"a": shared, "b": shared, "c": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    found = load_tensors(path)
    assert torch.equal(found["a"], found["b"]) and found["c"].float().tolist() == [1, 1]
    module = nn.Linear(2, 1)
    state = {"weight": torch.ones(1, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(1)}
    checkpoint.load_state(module, state, "w")
    assert module.weight.tolist() == [[1, 1]]


def test_names_that_cannot_be_files(tmp_path):
    for name in ("a" * 5000, "a" * 5000 + ".pt", "a\0b.pt"):
        with pytest.raises(CheckpointError) as caught:
            load_backbone(name)
        assert len(str(caught.value)) < 2000
    os.mkfifo(tmp_path / "pipe.pt")
    for load in (models.load, load_tensors, load_backbone):
        with pytest.raises(CheckpointError, match=r"pipe\.pt: no such .*file; that is no regular file"):
            load(tmp_path / "pipe.pt" if load is not load_backbone else str(tmp_path / "pipe.pt"))
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="no such checkpoint file; that is a folder"):
        models.load(tmp_path / "folder.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page, not a weights file"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip; unpack it first"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    ],
)
@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors"])
def test_what_people_give_for_weights_is_named(tmp_path, content, message, ending):
    path = tmp_path / f"theirs{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(path)


def test_zip_files_that_are_no_torch_files(tmp_path):
    path = tmp_path / "theirs.pt"
    np.savez(tmp_path / "theirs.npz", a=np.zeros(3))
    (tmp_path / "theirs.npz").rename(path)
    with pytest.raises(CheckpointError, match=r"a NumPy archive \(\.npz\)"):
        load_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointError, match=r"a zip archive, and not a torch file: it has no data\.pkl"):
        load_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(100 << 20))
    with pytest.raises(CheckpointError, match=r"bytes, and unpacked 104857600"):
        load_tensors(path)


def test_the_content_decides_and_not_the_ending(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "renamed.bin")
    torch.save(STATE, tmp_path / "renamed.safetensors")
    for path in list(tmp_path.iterdir()):
        found = load_tensors(path)
        assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_gives_its_state_dict(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
            self.tied = self.layers[0]
            self.small = nn.Parameter(torch.ones(2, dtype=torch.float16))
            self.register_buffer("empty", torch.zeros(0, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    network = Net()
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    found, wanted = load_tensors(tmp_path / "net.pt"), network.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_runs_nothing_and_damage_is_told(tmp_path):
    import pickle

    trace, path = tmp_path / "it-ran", tmp_path / "net.pt"
    torch.jit.script(nn.Linear(2, 3)).save(str(path))

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    for data in (pickle.dumps(Bomb(), protocol=2), b"", b"\x80\x02.", bytes(50)):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
            for member in old.namelist():
                new.writestr(member, data if member.endswith("/data.pkl") else old.read(member))
        with pytest.raises(CheckpointError, match=r"new\.pt: (a TorchScript archive|holds no tensors)"):
            load_tensors(tmp_path / "new.pt")
    assert not trace.exists()


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


EXTRA = {"epoch": 3, "best": np.float64(71.25), "scores": np.arange(3), "when": Path("x")}


@pytest.mark.parametrize(
    "data",
    [
        STATE,
        under("module."),
        {"state_dict": under("_orig_mod.")},
        {"state_dict": under("_orig_mod.module.")},
        {"model": under("module.module."), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        {"state_dict": STATE, **EXTRA},
        {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, model="x")},
        {"epoch": 3, "state_dict_ema": STATE},
        {"model_state_dict": STATE, "optimizer_state_dict": {}},
        {"state_dict": {"model": STATE}},
        {"epoch": 1, "generator": STATE},
        {"teacher": {**under("backbone."), "dino_head.weight": torch.zeros(2)}},
        {"student": under("backbone."), "teacher": {**under("backbone.")}},
        {"state_dict": under("net.encoder."), "hyper_parameters": {"lr": 1.0}},
        {**under("student.backbone."), **under("teacher.backbone.")},
        {**under("model."), "head.weight": torch.zeros(3)},
        {"model": under("model._fsdp_wrapped_module.")},
    ],
)
def test_what_trainers_wrap_around_a_state_dict_is_taken_off(tmp_path, data):
    path = tmp_path / "w.pt"
    torch.save(data, path)
    found = load_tensors(path, STATE.keys())
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"epoch": 1, "lr": 0.1}, "holds no tensors; wanted a state dict.*; got the keys epoch, lr$"),
        ({0: torch.zeros(1), 1: torch.zeros(2)}, r"its tensors have no names: one stands under 0 \(a int\)"),
        (
            {10**5000: torch.zeros(1)},
            r"w\.pt: reading it could run code.*, or it is no torch file.*safetensors\.torch\.save_file\(",
        ),
        ({("x",): 2, 1.5: 3, 7: 4}, "got the keys a tuple, a float, 7"),
        ([torch.zeros(1)], "holds no tensors.*; got a list"),
        ({"discriminator": STATE, "generator": STATE}, "got the keys discriminator, generator"),
        ({**under("one."), **under("two.")}, "holds these weights more than once, under 'one.' and 'two.'"),
        ({**STATE, **under("module.")}, r"two tensors are both a\.weight without wrappings"),
        ({"metadata": "{}", "sha256": "", "tensors": STATE}, "a checkpoint of am-radio; give the file alone"),
    ],
)
def test_what_cannot_be_taken_off_is_named(tmp_path, data, message):
    path = tmp_path / "w.pt"
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(path, STATE.keys())


def test_a_global_that_is_not_harmless_is_named(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": STATE, "model": nn.Linear(2, 2)}, path)
    with pytest.raises(
        CheckpointError, match=r"it names torch\.nn\.modules\.linear\.Linear.*nothing was run"
    ):
        read_torch(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("format", "model", "resolution", "teachers", "data", "name")
FIELDS = (
    "class_tokens",
    "registers",
    "stem",
    "window",
    "schedule",
    "activation_checkpointing",
    "upsample",
    "image_size",
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
@given(key=st.sampled_from(KEYS), value=JSON, field=st.sampled_from(FIELDS), drop=st.booleans())
def test_any_card_is_a_model_or_one_error(tmp_path_factory, weights, key, value, field, drop):
    path = tmp_path_factory.mktemp("metadata") / "ckpt.pt"
    text = metadata(**{key: value}) if drop else metadata(model=changed(**{field: value}))
    try:
        loaded = models.load(write(path, text, weights))
    except RadioError:
        pass
    else:
        assert loaded.fingerprint and isinstance(loaded.native_size[0], int)


TENSORS = st.sampled_from(
    [torch.zeros(2, 3), torch.zeros(2), torch.zeros(()), torch.zeros(0, 5), torch.ones(2, dtype=torch.int64)]
)
THINGS = st.recursive(
    TENSORS | st.integers() | st.none() | st.text(max_size=5) | st.just(np.float64(1)),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["a.weight", "a.bias", "state_dict", "model", "module.a.weight", "x.a.bias"])
            | st.integers(0, 3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
@given(data=THINGS)
def test_any_torch_file_is_a_state_dict_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "w.pt"
    torch.save(data, path)
    try:
        found = load_tensors(path, STATE.keys())
        checkpoint.load_state(nn.ModuleDict({"a": nn.Linear(3, 2)}), found, "w")
    except RadioError:
        pass
    else:
        assert found.keys() == STATE.keys()
