"""Weights files of every family as other people wrap, rename and damage them: the teacher, or one error."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from radio.errors import CheckpointError, RadioError
from radio.hub import load_teacher
from radio.teachers import dinov2, sam
from radio.teachers.dinov2 import Resampling
from radio.teachers.sam import load_sam_head, new_released_sam

State = dict[str, Tensor]


def _timm(name: str) -> State:
    torch.manual_seed(0)
    state: State = timm.create_model(name, num_classes=10).state_dict()
    return state


def _dinov2() -> State:
    torch.manual_seed(0)
    trunk = dinov2.DinoTrunk(dinov2.MEMBERS["vits14"], Resampling())
    return {**trunk.state_dict(), "mask_token": torch.zeros(1, 384)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2 and SAM of one or two narrow blocks."""
    member = replace(dinov2.MEMBERS["vits14"], width=64, depth=1)
    monkeypatch.setitem(dinov2.MEMBERS, "vits14", member)
    narrow = sam.SamArchitecture(width=32, depth=1, num_heads=2, global_blocks=(0,))
    monkeypatch.setitem(sam.MEMBERS, "vit_b", narrow)


def _sam() -> State:
    torch.manual_seed(0)
    whole = new_released_sam(32)
    encoder = sam.build_encoder(sam.MEMBERS["vit_b"])
    return {
        **whole.state_dict(),
        **{f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()},
    }


FAMILIES: dict[str, Callable[[], State]] = {
    "timm:test_resnet": lambda: _timm("test_resnet"),
    "timm:test_vit": lambda: _timm("test_vit"),
    "dinov2:vits14": _dinov2,
    "sam:vit_b": _sam,
}


def _under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "ddp": lambda state: {"state_dict": _under("module.", state)},
    "compiled": lambda state: {"state_dict": _under("_orig_mod.", state)},
    "both": lambda state: {"state_dict": _under("_orig_mod.module.", state), "best": np.float64(71.25)},
    "args": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "ema": lambda state: {"epoch": 3, "state_dict_ema": state},
    "dino": lambda state: {"teacher": {**_under("backbone.", state), "dino_head.weight": torch.zeros(2)}},
    "lightning": lambda state: {"state_dict": {**_under("model.", state), "loss.weight": torch.ones(1)}},
    "safe": lambda state: state,
}


@pytest.mark.parametrize("spec", FAMILIES)
def test_wrapped_weights_make_the_same_teacher(tmp_path: Path, spec: str) -> None:
    state = FAMILIES[spec]()
    torch.save(state, tmp_path / "plain.pt")
    plain = load_teacher(f"{spec}@{tmp_path / 'plain.pt'}")
    for name, wrap in WRAPPINGS.items():
        path = tmp_path / f"{name}.pt"
        torch.save(wrap(state), path)
        assert load_teacher(f"{spec}@{path}").fingerprint == plain.fingerprint, name


def test_a_sam_heads_file_may_be_wrapped_too(tmp_path: Path) -> None:
    state = _sam()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": _under("module.", state)}, tmp_path / "ddp.pt")
    torch.save({"state_dict": _under("sam_model.", state)}, tmp_path / "under.pt")
    heads = {load_sam_head("sam:vit_b", path).fingerprint for path in tmp_path.iterdir()}
    assert len(heads) == 1


@pytest.mark.parametrize("spec", FAMILIES)
def test_weights_of_nan_make_no_teacher(tmp_path: Path, spec: str) -> None:
    state = FAMILIES[spec]()
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name] = torch.full_like(state[name], torch.nan)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"1 of its \d+ tensors hold NaN or infinities"):
        load_teacher(f"{spec}@{tmp_path / 'w.pt'}")


def test_classes_that_the_file_cannot_hold_are_refused_before_they_are_built(tmp_path: Path) -> None:
    state = _timm("test_resnet")
    state["fc.weight"] = torch.zeros(10**12, 0)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"not the weights of timm:test_resnet: fc\.weight of shape"):
        load_teacher(f"timm:test_resnet@{tmp_path / 'w.pt'}")


ODD = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, 2),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(1, 1, 1, 1, 1),
        torch.zeros(1).expand(1000),
        None,
        "text",
        3,
    ]
)


@functools.cache
def _plain(spec: str) -> State:
    """A family's weights, of a SAM those of the encoder alone."""
    return {name: tensor for name, tensor in FAMILIES[spec]().items() if "_decoder" not in name}


@settings(
    max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
@given(data=st.data(), spec=st.sampled_from(list(FAMILIES)))
def test_any_change_of_a_file_is_a_teacher_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, spec: str
) -> None:
    state: dict[Any, Any] = dict(_plain(spec))
    names = st.sampled_from(list(state))
    for name in data.draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        value = state.pop(name)
        key = data.draw(st.sampled_from([name, f"x.{name}", 0, "", name.upper(), "pos_embed", "reg_token"]))
        odd = data.draw(ODD | st.just(value))
        state[key] = odd
    path = tmp_path_factory.mktemp("odd") / "w.pt"
    torch.save(state, path)
    try:
        teacher = load_teacher(f"{spec}@{path}")
    except RadioError as error:
        assert len(str(error)) < 2000  # noqa: PT017 (either is right)
    else:
        assert teacher.fingerprint
