"""GGUF files that are wrong in one place: named cases, and as many seeded ones as wanted.

A file is taken apart (`Parts.of`), changed and put together again. Every crash that was found becomes a named case.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _F32 = 4, 6


@dataclass(slots=True)
class Value:
    """`kind` is GGUF's; an array has the kind of its items as well."""

    kind: int
    value: object
    items: int = 0


@dataclass(slots=True)
class Tensor:
    name: bytes
    shape: list[int]
    kind: int
    offset: int


@dataclass(slots=True)
class Parts:
    """What a file consists of; the counts are those of its header, whatever follows."""

    keys: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    end: bytes = b""
    _place: int = field(default=0, repr=False)

    @classmethod
    def of(cls, source: bytes) -> Parts:
        reader = _Reader(source, 8)
        tensors, keys = reader.scalar("Q"), reader.scalar("Q")
        made = cls([(reader.text(), reader.value()) for _ in range(keys)], [], b"")
        made.tensors = [reader.tensor() for _ in range(tensors)]
        made.data = source[-(-reader.place // ALIGNMENT) * ALIGNMENT :]
        return made

    def bytes(self, alignment: int = ALIGNMENT) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        head += b"".join(_text(name) + struct.pack("<I", value.kind) + _written(value) for name, value in self.keys)
        head += b"".join(map(_entry, self.tensors))
        return head + bytes(-len(head) % alignment) + self.data + self.end

    def __getitem__(self, name: str) -> Value:
        return next(value for key, value in self.keys if key == name.encode())

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())


@dataclass(slots=True)
class _Reader:
    source: bytes
    place: int

    def scalar(self, form: str) -> int:
        size = struct.calcsize(form)
        self.place += size
        [value] = struct.unpack_from("<" + form, self.source, self.place - size)
        return value  # type: ignore[no-any-return]

    def text(self) -> bytes:
        size = self.scalar("Q")
        self.place += size
        return self.source[self.place - size : self.place]

    def value(self) -> Value:
        kind = self.scalar("I")
        if kind == _ARRAY:
            items = self.scalar("I")
            return Value(kind, [self._plain(items) for _ in range(self.scalar("Q"))], items)
        return Value(kind, self._plain(kind))

    def tensor(self) -> Tensor:
        name = self.text()
        shape = [self.scalar("Q") for _ in range(self.scalar("I"))]
        return Tensor(name, shape, self.scalar("I"), self.scalar("Q"))

    def _plain(self, kind: int) -> object:
        return self.text() if kind == _STRING else self.scalar(_SCALARS[kind])


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _written(value: Value) -> bytes:
    if value.kind != _ARRAY:
        return _plain(value.kind, value.value)
    assert isinstance(value.value, list)
    items = b"".join(_plain(value.items, item) for item in value.value)
    return struct.pack("<IQ", value.items, len(value.value)) + items


def _plain(kind: int, value: object) -> bytes:
    if kind == _STRING:
        assert isinstance(value, bytes)
        return _text(value)
    return struct.pack("<" + _SCALARS.get(kind, "Q"), value)


def _entry(tensor: Tensor) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, tensor.offset)


Mutation = Callable[[Parts], None]
_HUGE, _MOST = 1 << 31, (1 << 64) - 1


def _set(name: str, value: object, kind: int | None = None) -> Mutation:
    """A key's value, and its type; a new key where there is none."""

    def mutate(parts: Parts) -> None:
        if name.encode() in dict(parts.keys):
            found = parts[name]
            found.value, found.kind = value, found.kind if kind is None else kind
        else:
            parts.keys.append((name.encode(), Value(_U32 if kind is None else kind, value)))

    return mutate


def _drop(name: str) -> Mutation:
    def mutate(parts: Parts) -> None:
        parts.keys = [(key, value) for key, value in parts.keys if key != name.encode()]

    return mutate


def _items(name: str, change: Callable[[list[object]], list[object]]) -> Mutation:
    """The items of an array."""

    def mutate(parts: Parts) -> None:
        items = parts[name].value
        assert isinstance(items, list)
        parts[name].value = change(items)

    return mutate


def _tensor(which: str, **changes: object) -> Mutation:
    def mutate(parts: Parts) -> None:
        place = parts.tensors.index(parts.tensor(which))
        parts.tensors[place] = replace(parts.tensors[place], **changes)  # type: ignore[arg-type]

    return mutate


def _parts(**changes: object) -> Mutation:
    def mutate(parts: Parts) -> None:
        for name, value in changes.items():
            setattr(parts, name, value)

    return mutate


def _data(change: Callable[[bytes], bytes]) -> Mutation:
    def mutate(parts: Parts) -> None:
        parts.data = change(parts.data)

    return mutate


def _repeat_a_tensor(parts: Parts) -> None:
    parts.tensors.append(parts.tensors[0])


def _repeat_a_key(parts: Parts) -> None:
    parts.keys.append(parts.keys[0])


def _lose_a_tensor(parts: Parts) -> None:
    parts.tensors.remove(parts.tensor("blk.1.attn_q.weight"))


_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_EMBEDDING, _NORM, _UP = "token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_up.weight"

NAMED: Mapping[str, Mutation] = {
    "another magic": _parts(magic=b"GGML"),
    "version 0": _parts(version=0),
    "version 1": _parts(version=1),
    "a version of the future": _parts(version=99),
    "big-endian": _parts(version=3 << 24),
    "more keys than there are": _parts(key_count=10_000),
    "endless keys": _parts(key_count=_MOST),
    "fewer keys than there are": _parts(key_count=3),
    "no keys": _parts(keys=[]),
    "a key twice": _repeat_a_key,
    "more tensors than there are": _parts(tensor_count=10_000),
    "endless tensors": _parts(tensor_count=_MOST),
    "fewer tensors than there are": _parts(tensor_count=3),
    "no tensors": _parts(tensors=[]),
    "a tensor twice": _repeat_a_tensor,
    "a tensor less": _lose_a_tensor,
    "no data": _parts(data=b""),
    "half of the data": _data(lambda data: data[: len(data) // 2]),
    "a byte less": _data(lambda data: data[:-1]),
    "something behind the end": _parts(end=b"something else" * 100),
    "zeros for weights": _data(lambda data: bytes(len(data))),
    "NaN for weights": _data(lambda data: struct.pack("<f", math.nan) * (len(data) // 4)),
    "infinities for weights": _data(lambda data: struct.pack("<f", math.inf) * (len(data) // 4)),
    "no architecture": _drop("general.architecture"),
    "an unknown architecture": _set("general.architecture", b"llamo"),
    "an empty architecture": _set("general.architecture", b""),
    "an architecture that is a number": _set("general.architecture", 7, _U32),
    "an architecture that is not UTF-8": _set("general.architecture", b"\xff\xfe"),
    "no blocks": _set("llama.block_count", 0),
    "513 blocks": _set("llama.block_count", 513),
    "2^31 blocks": _set("llama.block_count", _HUGE),
    "a block more than there are": _set("llama.block_count", 4),
    "next-token layers beyond the blocks": _set("llama.nextn_predict_layers", 9),
    "experts that are not there": _set("llama.expert_count", 8),
    "more experts used than there are": _set("llama.expert_used_count", 8),
    "no width": _set("llama.embedding_length", 0),
    "another width": _set("llama.embedding_length", 96),
    "no context": _set("llama.context_length", 0),
    "a context of 2^31": _set("llama.context_length", _HUGE),
    "no feed-forward": _set("llama.feed_forward_length", 0),
    "no heads": _set("llama.attention.head_count", 0),
    "heads that do not divide the width": _set("llama.attention.head_count", 3),
    "no KV heads": _set("llama.attention.head_count_kv", 0),
    "more KV heads than heads": _set("llama.attention.head_count_kv", 64),
    "a key length of 0": _set("llama.attention.key_length", 0),
    "an odd key length": _set("llama.attention.key_length", 15),
    "a negative RMS epsilon": _set("llama.attention.layer_norm_rms_epsilon", -1.0),
    "a RMS epsilon that is no number": _set("llama.attention.layer_norm_rms_epsilon", math.nan),
    "no RMS epsilon": _drop("llama.attention.layer_norm_rms_epsilon"),
    "an unknown rope scaling": _set("llama.rope.scaling.type", b"elastic", _STRING),
    "a rope factor of 0": _set("llama.rope.scaling.factor", 0.0, _F32),
    "a rope base that is no number": _set("llama.rope.freq_base", math.nan),
    "an odd rope dimension": _set("llama.rope.dimension_count", 15),
    "a rope dimension of 2^31": _set("llama.rope.dimension_count", _HUGE),
    "a clamp that is no number": _set("llama.attention.clamp_kqv", math.nan, _F32),
    "an unknown tokenizer": _set("tokenizer.ggml.model", b"abacus"),
    "an unknown pre-tokenizer": _set("tokenizer.ggml.pre", b"abacus"),
    "no tokens": _items(_TOKENS, lambda _: []),
    "a token less": _items(_TOKENS, lambda tokens: tokens[:-1]),
    "a token twice": _items(_TOKENS, lambda tokens: [*tokens[:-1], tokens[-2]]),
    "tokens that are not UTF-8": _items(_TOKENS, lambda tokens: [b"\xff\xfe"] * len(tokens)),
    "empty tokens": _items(_TOKENS, lambda tokens: [b""] * len(tokens)),
    "fewer types than tokens": _items(_TYPES, lambda kinds: kinds[:10]),
    "unknown token types": _items(_TYPES, lambda kinds: [99] * len(kinds)),
    "control tokens only": _items(_TYPES, lambda kinds: [3] * len(kinds)),
    "merges of nothing": _items("tokenizer.ggml.merges", lambda merges: [b""] * len(merges)),
    "a beginning beyond the vocabulary": _set("tokenizer.ggml.bos_token_id", 1 << 30),
    "an end beyond the vocabulary": _set("tokenizer.ggml.eos_token_id", 1 << 30),
    "an end of -1": _set("tokenizer.ggml.eos_token_id", _MOST >> 32),
    "a template that does not parse": _set("tokenizer.chat_template", b"{% if %}", _STRING),
    "a template that is not UTF-8": _set("tokenizer.chat_template", b"\xff\xfe", _STRING),
    "a template that is a number": _set("tokenizer.chat_template", 7, _U32),
    "an alignment of 0": _set("general.alignment", 0),
    "an alignment of 3": _set("general.alignment", 3),
    "an alignment of 2^31": _set("general.alignment", _HUGE),
    "a file type that does not exist": _set("general.file_type", 12345),
    "a part of a split that is not there": _set("split.count", 3, 2),
    "an unknown value type": _set("general.name", 0, 77),
    "a tensor of an unknown type": _tensor(_UP, kind=9999),
    "a tensor of integers": _tensor(_UP, kind=26),
    "a tensor of bytes": _tensor(_NORM, kind=24),
    "an embedding of doubles": _tensor(_EMBEDDING, kind=28),
    "a quantized tensor that is too long": _tensor(_UP, kind=8),
    "a tensor without dimensions": _tensor(_UP, shape=[]),
    "a tensor of five dimensions": _tensor(_UP, shape=[64, 128, 1, 1, 1]),
    "a tensor of nothing": _tensor(_UP, shape=[0, 0]),
    "a tensor of another shape": _tensor(_UP, shape=[128, 64]),
    "a tensor larger than memory": _tensor(_UP, shape=[1 << 40, 1 << 20]),
    "a tensor whose size overflows": _tensor(_UP, shape=[1 << 33, 1 << 31]),
    "a tensor beyond the file": _tensor(_UP, offset=1 << 40),
    "a tensor at the end of numbers": _tensor(_UP, offset=_MOST - 31),
    "a tensor that is not aligned": _tensor(_UP, offset=7),
    "two tensors in one place": _tensor(_UP, offset=0),
    "a tensor with a long name": _tensor(_UP, name=b"x" * 1000),
    "a tensor without a name": _tensor(_UP, name=b""),
    "a tensor whose name is not UTF-8": _tensor(_UP, name=b"\xff\xfe"),
}


def named(source: bytes, name: str) -> bytes:
    parts = Parts.of(source)
    NAMED[name](parts)
    return parts.bytes()


def seeded(source: bytes, seed: int) -> bytes:
    """The file with some bytes of its head changed by chance, or cut, or with a piece moved."""
    rng = random.Random(seed)
    head = len(source) - len(Parts.of(source).data)
    changed = bytearray(source)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(4, head)
        match rng.randrange(5):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                changed[place : place + 8] = rng.randbytes(8)
            case 3:
                changed[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 0xFFFF, _HUGE, 0xFFFFFFFF]))
            case 4:
                size = rng.randrange(1, 64)
                start = rng.randrange(4, head)
                changed[place : place + size] = source[start : start + size]
    return bytes(changed[: rng.randrange(head)] if rng.random() < 0.05 else changed)
