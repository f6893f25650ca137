"""Model files: what a header says, and the sentence that each kind of wrong file gets."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rustllama import gguf
from rustllama.core import ModelInfo
from rustllama.errors import BadModelFile
from tests.toys import CONTROL_TOKENS, GEMMA3, JAMBA, LLAMA, MAMBA, write_toy

KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b"],
}
WEIGHT = ("token_embd.weight", (32, 4), 0)  # name, shape, type


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value_of(value: Any) -> bytes:
    """Its type and itself; an int is an uint32 and a float a float32, as llama.cpp wants them."""
    if isinstance(value, list):
        kind = value_of(value[0])[:4]
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(value_of(e)[4:] for e in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def gguf_bytes(keys: dict[str, Any], tensors: tuple[Any, ...] = (WEIGHT,), version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(key) + value_of(value) for key, value in keys.items())
    offset = 0
    for name, shape, kind in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += -(-4 * math.prod(shape) // 32) * 32
    return head + bytes(-len(head) % 32 + offset)


def model(folder: Path, tensors: tuple[Any, ...] = (WEIGHT,), **changes: Any) -> Path:
    """A file with KEYS but for `changes`, whose names have `__` for a dot; None leaves the key out."""
    keys = {**KEYS, **{name.replace("__", "."): value for name, value in changes.items()}}
    path = folder / "model.gguf"
    path.write_bytes(gguf_bytes({key: value for key, value in keys.items() if value is not None}, tensors))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        gguf.read(path)
    return str(caught.value)


def test_a_toy_is_described_completely(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.gguf", LLAMA, chat_template="{{ messages }}")
    info = gguf.read(path)
    assert (info.architecture, info.quantization, info.block_count, info.head_count) == ("llama", "F32", 3, 4)
    assert (info.head_count_kv, info.key_length, info.value_length) == ((2, 2, 2), 16, 16)
    assert (info.context_length, info.embedding_length, info.vocabulary_size) == (2048, 64, 512)
    assert (info.sliding_window, info.recurrent_state_bytes) == (0, 0)
    assert (info.size_bytes, info.parts) == (path.stat().st_size, (str(path),))
    assert info.chat_template == "{{ messages }}"
    assert info.capabilities == ("completion", "chat")


def test_parameters_are_counted_from_the_tensors(tmp_path: Path) -> None:
    assert gguf.read(model(tmp_path, (WEIGHT, ("output.weight", (32, 5), 0)))).parameter_count == 32 * 4 + 32 * 5


def test_a_sliding_window_is_told(tmp_path: Path) -> None:
    assert gguf.read(write_toy(tmp_path / "toy.gguf", GEMMA3)).sliding_window == 64


def test_a_window_that_llama_cpp_ignores_is_not_told(tmp_path: Path) -> None:
    assert gguf.read(model(tmp_path, llama__attention__sliding_window=64)).sliding_window == 0


def test_a_recurrent_model_has_a_state_and_no_kv_cache(tmp_path: Path) -> None:
    info = gguf.read(write_toy(tmp_path / "toy.gguf", MAMBA))
    assert info.head_count_kv == (0, 0, 0)
    assert info.recurrent_state_bytes == 3 * 4 * (3 * 128 + 16 * 128)  # blocks, float, convolution and state


def test_a_hybrid_model_tells_by_its_heads_which_blocks_attend(tmp_path: Path) -> None:
    info = gguf.read(write_toy(tmp_path / "toy.gguf", JAMBA))
    assert info.head_count_kv == (0, 2, 0)
    assert info.recurrent_state_bytes == 2 * 4 * (3 * 128 + 16 * 128)


def test_a_hybrid_model_keeps_kv_only_where_it_attends(tmp_path: Path) -> None:
    keys = {key.replace("llama.", "qwen3next."): value for key, value in KEYS.items()}
    keys |= {"general.architecture": "qwen3next", "qwen3next.block_count": 4, "qwen3next.ssm.conv_kernel": 4}
    keys |= {"qwen3next.ssm.inner_size": 64, "qwen3next.ssm.state_size": 16, "qwen3next.ssm.group_count": 2}
    path = tmp_path / "hybrid.gguf"
    path.write_bytes(gguf_bytes(keys))
    info = gguf.read(path)
    assert info.head_count_kv == (0, 0, 0, 2)
    assert info.recurrent_state_bytes == 3 * 4 * (3 * (64 + 2 * 2 * 16) + 16 * 64)


def test_heads_may_differ_by_block(tmp_path: Path) -> None:
    assert gguf.read(model(tmp_path, llama__attention__head_count_kv=[4, 1])).head_count_kv == (4, 1)


def test_the_quantization_is_guessed_from_the_tensors_where_the_file_does_not_say(tmp_path: Path) -> None:
    assert gguf.read(model(tmp_path, (("token_embd.weight", (256, 4), 12),))).quantization == "Q4_K"
    assert gguf.read(model(tmp_path, general__file_type=15)).quantization == "Q4_K_M"


def test_an_encoder_embeds_and_does_not_chat(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    path.write_bytes(
        gguf_bytes({key.replace("llama.", "bert."): v for key, v in KEYS.items()} | {"general.architecture": "bert"})
    )
    assert gguf.read(path).capabilities == ("embedding",)


def test_metadata_names_the_special_tokens_and_leaves_out_the_vocabulary(tmp_path: Path) -> None:
    metadata = gguf.read(write_toy(tmp_path / "toy.gguf")).metadata
    assert metadata["tokenizer.ggml.bos_token"] == CONTROL_TOKENS[0]
    assert metadata["tokenizer.ggml.eos_token"] == CONTROL_TOKENS[2]
    assert "tokenizer.ggml.tokens" not in metadata


def test_control_tokens_are_listed_by_family(tmp_path: Path) -> None:
    tokens = ["<s>", "<unused17>", "<unused4>", "]~b]", "b"]
    path = model(tmp_path, tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=[2, 3, 3, 3, 1])
    assert gguf.read(path).metadata["tokenizer.ggml.control_tokens"] == ["<s>", "<unused0>", "]~b]"]


def test_infinite_metadata_can_be_stored_as_json(tmp_path: Path) -> None:
    info = gguf.read(model(tmp_path, llama__rope__freq_base=math.inf))
    assert msgspec.json.decode(msgspec.json.encode(info), type=ModelInfo) == info


def test_version_two_is_read_and_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(KEYS, version=2))
    assert gguf.read(path).architecture == "llama"
    path.write_bytes(gguf_bytes(KEYS, version=1))
    assert "version 1" in refusal(path)


def test_a_relative_path_becomes_absolute_in_the_sentence() -> None:
    assert refusal(Path("nowhere/model.gguf")).startswith(f"There is no file at {os.getcwd()}/nowhere/model.gguf")


def test_a_folder_gets_its_own_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name the .gguf file in it."


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a\0b.gguf", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    assert "cannot be opened" in refusal(Path(name))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"PK\x03\x04 archive", "a zip archive"),
        (struct.pack("<Q", 60) + b'{"weights":{}}', "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"tjgg older", "GGJT"),
        (b"hello, world", "is not a GGUF file; give"),
    ],
)
def test_a_foreign_file_is_recognised(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert words in refusal(path)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("counts", [(1 << 60, 0), (0, 1 << 60), (1, 1 << 15), (1 << 19, 0)])
def test_counts_are_not_believed(tmp_path: Path, counts: tuple[int, int]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    assert "damaged or truncated" in refusal(path)


@pytest.mark.parametrize("kind", [8, 4, 12])
@pytest.mark.parametrize("key", ["a.list", "tokenizer.ggml.tokens"])
def test_the_length_of_an_array_is_not_believed(tmp_path: Path, kind: int, key: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(key) + struct.pack("<IIQ", 9, kind, 1 << 60))
    assert "damaged or truncated" in refusal(path)


def test_every_cut_of_a_file_gives_a_sentence(tmp_path: Path) -> None:
    whole = model(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        assert refusal(cut).startswith(str(cut))


def test_missing_tensor_data_is_told_in_bytes(tmp_path: Path) -> None:
    path = model(tmp_path)
    size = path.stat().st_size
    os.truncate(path, size - 100)
    assert refusal(path) == f"{path} is truncated: it has {size - 100} bytes of {size}; download it again."


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    twice = text("a") + value_of(1)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + twice + twice)
    assert "the key 'a' is empty, too long or there twice" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": "clip"}, "vision projector"),
        ({"general__type": "mmproj"}, "vision projector"),
        ({"general__type": "adapter"}, "LoRA"),
        ({"general__type": "imatrix"}, "importance matrix"),
        ({"general__architecture": "t5"}, "encoder-decoder"),
        ({"general__architecture": "flux"}, "'flux', which this llama.cpp does not know"),
        ({"general__architecture": None}, "no general.architecture"),
        ({"llama__block_count": 0}, "block_count is 0"),
        ({"llama__block_count": 513}, "block_count is 513"),
        ({"llama__block_count": "2"}, "of the wrong type"),
        ({"llama__nextn_predict_layers": 3}, "nextn_predict_layers"),
        ({"llama__context_length": 0}, "context_length is 0"),
        ({"llama__rope__scaling__type": "magic"}, "rope.scaling.type is 'magic'"),
        ({"llama__attention__layer_norm_rms_epsilon": -1e-5}, "layer_norm_rms_epsilon"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon is nan"),
        ({"llama__expert_used_count": 2}, "experts are inconsistent"),
        ({"llama__expert_count": 8}, "experts are inconsistent"),
        ({"llama__expert_count": 2000, "llama__expert_used_count": 2}, "experts are inconsistent"),
        ({"llama__expert_count": 8, "llama__expert_used_count": 2, "llama__expert_group_count": 3}, "inconsistent"),
        ({"llama__attention__head_count_kv": [1, 2, 3]}, "3 elements for 2 blocks"),
        ({"tokenizer__ggml__tokens": None}, "no vocabulary"),
        ({"tokenizer__ggml__tokens": ["a", "b", "a"]}, "'a' is in its vocabulary twice"),
        ({"tokenizer__ggml__model": "llama"}, "no token for the byte 0"),
    ],
)
def test_what_would_kill_llama_cpp_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(model(tmp_path, **changes))


@pytest.mark.parametrize("kind", [24, 25, 26])
def test_weights_that_are_integers_are_refused(tmp_path: Path, kind: int) -> None:
    assert "where weights belong" in refusal(model(tmp_path, (("token_embd.weight", (32, 4), kind),)))


@pytest.mark.parametrize("shape", [(33, 4), (1 << 40, 1 << 40)])
def test_a_shape_that_no_blocks_can_fill_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = model(tmp_path, (("token_embd.weight", (32, 4), 8),))
    path.write_bytes(path.read_bytes().replace(struct.pack("<QQ", 32, 4), struct.pack("<QQ", *shape)))
    assert "impossible shape" in refusal(path)


def test_a_vocabulary_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no weights" in refusal(model(tmp_path, ()))


def test_sentencepiece_needs_its_byte_tokens(tmp_path: Path) -> None:
    assert gguf.read(write_toy(tmp_path / "good.gguf", tokenizer="spm")).vocabulary_size == 512
    assert "no token for the byte 0" in refusal(write_toy(tmp_path / "bad.gguf", tokenizer="spm", byte_tokens=False))


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A model in three parts."""
    paths = [tmp_path / f"big-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        keys = {"split.no": number, "split.count": 3} | (KEYS if number == 0 else {})
        path.write_bytes(gguf_bytes(keys, ((f"weight.{number}", (32, 4), 0),)))
    return paths


def test_a_split_model_is_read_by_its_first_part(split: list[Path]) -> None:
    info = gguf.read(split[0])
    assert info.parts == tuple(map(str, split))
    assert info.size_bytes == sum(path.stat().st_size for path in split)
    assert info.parameter_count == 3 * 32 * 4


def test_another_part_says_which_is_the_first(split: list[Path]) -> None:
    assert f"name the first: {split[0]}" in refusal(split[1])


def test_a_missing_part_is_named(split: list[Path]) -> None:
    split[2].unlink()
    assert refusal(split[0]).startswith(f"{split[2]} is missing")
    with pytest.raises(BadModelFile, match="is missing"):
        gguf.identity(split[0])


def test_a_truncated_part_is_named(split: list[Path]) -> None:
    os.truncate(split[1], split[1].stat().st_size - 1)
    assert refusal(split[0]).startswith(f"{split[1]} is truncated")


def test_parts_in_the_wrong_order_are_refused(split: list[Path]) -> None:
    split[1].write_bytes(split[2].read_bytes())
    assert f"{split[1]} is not part 2 of 3" in refusal(split[0])


def test_a_split_model_under_another_name_is_refused(split: list[Path]) -> None:
    assert "has to be named like" in refusal(split[0].rename(split[0].with_name("renamed.gguf")))


def test_the_identity_changes_with_any_part(split: list[Path]) -> None:
    before = gguf.identity(split[0])
    assert gguf.identity(split[0]) == before
    os.utime(split[2], ns=(0, before.mtime_ns + 1))
    assert gguf.identity(split[0]) != before


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, again = write_toy(tmp_path / "a.gguf"), write_toy(tmp_path / "b.gguf")
    other = write_toy(tmp_path / "c.gguf", seed=1)
    digests = [gguf.digest(gguf.read(path)) for path in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def test_the_digest_sees_every_part(split: list[Path]) -> None:
    before = gguf.digest(gguf.read(split[0]))
    data = bytearray(split[2].read_bytes())
    data[-1] ^= 1
    split[2].write_bytes(data)
    assert gguf.digest(gguf.read(split[0])) != before
