"""GGUF files that are unusual in one place, and valid: each must be served."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.conftest import SHAPES
from tests.mutants import ALIGNMENT, Parts, Value
from tests.toys import CHATML, write_toy

Write = Callable[[Path], Path]
"""Makes the folder and the file in it, and returns what `create` is told."""

_STRING, _ARRAY, _U32, _F32 = 8, 9, 4, 6
_SCALARS = {0: 7, 1: -7, 2: 7, 3: -7, 4: 7, 5: -7, 6: 0.5, 7: True, 10: 1 << 60, 11: -(1 << 60), 12: 1e300}


def _toy(**changes: Any) -> Write:
    def write(folder: Path) -> Path:
        folder.mkdir()
        return write_toy(folder / "toy.gguf", **{"layers": 2, **changes})

    return write


def _with(change: Callable[[Parts], None]) -> Write:
    """A toy whose parts were changed."""

    def write(folder: Path) -> Path:
        path = _toy()(folder)
        parts = Parts.of(path.read_bytes())
        change(parts)
        path.write_bytes(parts.bytes())
        return path

    return write


def _keys(**values: Value) -> Write:
    """A dot in a name is written as two underscores."""
    added = [(name.replace("__", ".").encode(), value) for name, value in values.items()]
    return _with(lambda parts: parts.keys.extend(added))


def _every_type(parts: Parts) -> None:
    parts.keys += [(b"strange.%d" % kind, Value(kind, value)) for kind, value in _SCALARS.items()]
    parts.keys += [(b"strange.list.%d" % kind, Value(_ARRAY, [value] * 3, kind)) for kind, value in _SCALARS.items()]
    parts.keys += [(b"strange.texts", Value(_ARRAY, [b"", "ü\0".encode()], _STRING))]
    parts.keys += [(b"strange.nothing", Value(_ARRAY, [], _F32))]


def _without(*names: bytes) -> Write:
    def drop(parts: Parts) -> None:
        parts.keys = [(key, value) for key, value in parts.keys if key not in names]

    return _with(drop)


def _last_key_first(parts: Parts) -> None:
    architecture, *others = parts.keys
    parts.keys = [*reversed(others), architecture]


def _tied(parts: Parts) -> None:
    """The last tensor is the head; without it the embedding serves."""
    assert parts.tensors[-1].name == b"output.weight"
    parts.data = parts.data[: parts.tensors.pop().offset]


def _last_tensor_first(parts: Parts) -> None:
    weights = _weights(parts)
    parts.tensors.reverse()
    _lay_out(parts, weights[::-1], ALIGNMENT)


def _aligned(alignment: int) -> Write:
    """Head and tensors stand at multiples of it."""

    def write(folder: Path) -> Path:
        path = _toy()(folder)
        parts = Parts.of(path.read_bytes())
        parts.keys.append((b"general.alignment", Value(_U32, alignment)))
        _lay_out(parts, _weights(parts), alignment)
        path.write_bytes(parts.bytes(alignment))
        return path

    return write


def _weights(parts: Parts) -> list[bytes]:
    """Of each tensor, with what pads it."""
    ends = [*(tensor.offset for tensor in parts.tensors[1:]), len(parts.data)]
    return [parts.data[tensor.offset : end] for tensor, end in zip(parts.tensors, ends, strict=True)]


def _lay_out(parts: Parts, weights: list[bytes], alignment: int) -> None:
    """Without gaps, which llama.cpp refuses (gguf_init_from_reader)."""
    data = b""
    for tensor, own in zip(parts.tensors, weights, strict=True):
        data += bytes(-len(data) % alignment)
        data, tensor.offset = data + own, len(data)
    parts.data = data


def _split(folder: Path) -> Path:
    """In two files, of which the first is named."""
    whole = Parts.of(_toy()(folder).read_bytes())
    tensors, half = whole.tensors, len(whole.tensors) // 2
    border = tensors[half].offset
    counts = [(b"split.count", Value(2, 2)), (b"split.tensors.count", Value(5, len(tensors)))]
    head = Parts([*whole.keys, *counts, (b"split.no", Value(2, 0))], tensors[:half], whole.data[:border])
    rest = Parts([*counts, (b"split.no", Value(2, 1))], tensors[half:], whole.data[border:])
    for tensor in rest.tensors:
        tensor.offset -= border
    for number, parts in enumerate((head, rest), 1):
        (folder / f"toy-{number:05}-of-00002.gguf").write_bytes(parts.bytes())
    return folder / "toy-00001-of-00002.gguf"


def _elsewhere(folder: Path) -> Path:
    """Behind a link, below a folder with a strange name."""
    path = _toy()(folder)
    strange = folder / "é 世 'x'"
    strange.mkdir()
    link = strange / "-model .GGUF"
    link.symlink_to(path)
    return link


def _appended(folder: Path) -> Path:
    path = _toy()(folder)
    path.write_bytes(path.read_bytes() + b"something else" * 1_000)
    return path


def _version_2(folder: Path) -> Path:
    path = _toy()(folder)
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + path.read_bytes()[8:])
    return path


VALID: Mapping[str, Write] = {
    **{f"a {name}": _toy(**{field: getattr(shape, field) for field in ("architecture", "layers")})
       for name, shape in SHAPES.items() if name != "llama"},
    **{f"the architecture {name}": _toy(architecture=name) for name in ("internlm2", "smollm3", "minicpm", "mistral3")},
    **{f"weights in {name}": _toy(quantization=name) for name in ("F16", "BF16", "Q8_0", "Q4_0")},
    "a SentencePiece vocabulary": _toy(tokenizer="spm"),
    "prompts that begin with a token": _toy(add_bos=True, chat_template=CHATML),
    "one block": _toy(layers=1),
    "as many KV heads as heads": _toy(kv_heads=4),
    "version 2": _version_2,
    "values of every type": _with(_every_type),
    "a long licence": _keys(general__license=Value(_STRING, b"x" * 1_000_000)),
    "no name and no file type": _without(b"general.name", b"general.file_type"),
    "the architecture as the last key": _with(_last_key_first),
    "a rope that is scaled": _keys(
        llama__rope__scaling__type=Value(_STRING, b"linear"), llama__rope__scaling__factor=Value(_F32, 4.0)
    ),
    "a context of a million": _toy(context_length=1_000_000),
    "a head that is the embedding": _with(_tied),
    "the tensors in another order": _with(_last_tensor_first),
    "an alignment of 64": _aligned(64),
    "an alignment of 4096": _aligned(4096),
    "two parts": _split,
    "a link in a strange folder": _elsewhere,
    "something behind the end": _appended,
}  # fmt: skip
