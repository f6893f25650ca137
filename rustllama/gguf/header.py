"""The GGUF format, read from its beginning to the end of the tensor table: keys, values, and where each tensor lies.

Pure Python over buffered reads (a mapped file that somebody truncates would kill the process), strict about lengths: no
count is believed before the bytes that it promises are there. Follows ggml's docs/gguf.md and what llama.cpp's reader
refuses, versions 2 and 3, little endian.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rustllama.errors import BadModelFile

Scalar = str | int | float | bool
Value = Scalar | list[str] | list[int] | list[float] | list[bool]

# name, elements of a block, bytes of a block
TENSOR_TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144)},
    **{13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17)},
    **{40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18)},
}

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SHORT_ARRAY = 1024  # elements; blocks have at most 512
_KEPT_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 20
_MOST_ELEMENTS = 1 << 22  # of an array of strings or one that is kept; the largest vocabularies have 2^18
_LONGEST_STRING, _LONGEST_KEY = 1 << 26, 256  # bytes, characters

_LOOKS = (
    (b"<!", "an HTML page, as a failed download leaves it"),
    (b"<h", "an HTML page, as a failed download leaves it"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint"),
    (b"\x80\x02", "a pickled PyTorch checkpoint"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` where it came from"),
    (b"lmgg", "in the old GGML format, from before GGUF"),
    (b"tjgg", "in the old GGJT format, from before GGUF"),
    (b"fmgg", "in the old GGMF format, from before GGUF"),
)


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # the row's length first, as ggml has it
    type_name: str  # like "Q4_K"
    offset: int  # bytes from the start of the tensor data
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """`values` leaves out arrays beyond 1,024 elements but the vocabulary and its token types.

    Bytes of a token that are no UTF-8 are kept as lone surrogates, of other strings they are replaced.
    """

    path: Path
    size_bytes: int
    values: dict[str, Value]
    tensors: tuple[Tensor, ...]


def read_header(path: Path) -> Header:
    """Raises BadModelFile with one sentence for a missing, foreign, damaged or truncated file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_magic(path, file, size)
        reader = _Reader(path, file, size)
        version = reader.number("<I")
        if version not in (2, 3):
            raise BadModelFile(f"{path} is GGUF of version {version}; 2 and 3, little endian, can be read.")
        tensor_count = reader.count("tensors", _MOST_TENSORS)
        key_count = reader.count("keys", _MOST_KEYS)
        values = _read_values(reader, key_count)
        tensors = tuple(_read_tensor(reader) for _ in range(tensor_count))
        _check_layout(reader, tensors, values.get("general.alignment", 32))
    return Header(path, size, values, tensors)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens only a regular file, never waiting for a pipe or device. Raises BadModelFile."""
    try:
        _check_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadModelFile(f"There is no file at {path}; check the path.") from None
    except PermissionError:
        raise BadModelFile(f"The user that runs the server may not read {path}; change its permissions.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise BadModelFile(f"{str(path)!r} cannot be opened: {getattr(error, 'strerror', error)}.") from None
    with open(descriptor, "rb", buffering=1 << 20) as file:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced in between
        yield file


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BadModelFile(f"{path} is a folder; name the .gguf file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise BadModelFile(f"{path} is not a regular file but a device, pipe or socket; name a .gguf file.")


def _check_magic(path: Path, file: BinaryIO, size: int) -> None:
    start = file.read(64)
    file.seek(4)
    if size == 0:
        raise BadModelFile(f"{path} is empty; download it again.")
    if start[:4] == b"GGUF":
        return
    looks = [what for magic, what in _LOOKS if start.lower().startswith(magic.lower())]
    if start[8:10] == b'{"':
        looks = ["a safetensors file; convert it with llama.cpp's convert_hf_to_gguf.py"]
    raise BadModelFile(f"{path} is not a GGUF file" + (f": it is {looks[0]}." if looks else "; give a .gguf file."))


class _Reader:
    """Reads forward, never beyond what the file has."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self._file, self.size, self.position = path, file, size, file.tell()

    def damaged(self, why: str) -> BadModelFile:
        return BadModelFile(f"{self.path} is damaged or truncated: {why}; download it again.")

    def need(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.damaged("its header promises more than the file holds")
        self.position += count

    def take(self, count: int) -> bytes:
        self.need(count)
        data = self._file.read(count)
        if len(data) != count:
            raise self.damaged("it became shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self.need(count)
        self._file.seek(count, os.SEEK_CUR)

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def count(self, what: str, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise self.damaged(f"it claims to have {value} {what}")
        return value

    def string(self) -> str:
        length = self.count("bytes in a string", _LONGEST_STRING)
        return self.take(length).decode("utf-8", "replace")

    def strings(self, count: int) -> Iterator[bytes]:
        """The strings of an array: a vocabulary has 100,000, so this loop does what `take` does, but faster."""
        read, unpack, left = self._file.read, struct.Struct("<Q").unpack, self.size - self.position
        for _ in range(count):
            start = read(8)
            length = unpack(start)[0] if len(start) == 8 else left
            left -= 8 + length
            if left < 0:
                raise self.damaged("its header promises more than the file holds")
            yield read(length)
        self.position = self.size - left


def _read_values(reader: _Reader, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = reader.string()
        if key in seen or not 0 < len(key) <= _LONGEST_KEY:
            raise reader.damaged(f"the key {key[:60]!r} is empty, too long or there twice")
        seen.add(key)
        kind = reader.number("<I")
        value = _read_array(reader, key) if kind == _ARRAY else _read_scalar(reader, key, kind)
        if value is not None:
            values[key] = value
    return values


def _read_scalar(reader: _Reader, key: str, kind: int) -> Scalar:
    if kind == _STRING:
        return reader.string()
    if kind not in _SCALARS:
        raise reader.damaged(f"the key {key!r} has the unknown type {kind}")
    return reader.number(_SCALARS[kind])


def _read_array(reader: _Reader, key: str) -> Value | None:
    kind = reader.number("<I")
    kept = key in _KEPT_ARRAYS
    count = reader.count(f"elements in {key}", _MOST_ELEMENTS if kept or kind == _STRING else 1 << 60)
    kept = kept or count <= _SHORT_ARRAY
    if kind == _STRING:
        errors = "surrogateescape" if key in _KEPT_ARRAYS else "replace"
        texts = [text.decode("utf-8", errors) for text in reader.strings(count) if kept]
        return texts if kept else None
    if kind not in _SCALARS:
        raise reader.damaged(f"the array {key!r} has the unknown type {kind}")
    size = count * struct.calcsize(_SCALARS[kind])
    if kept:
        return list(struct.unpack(f"<{count}{_SCALARS[kind][1]}", reader.take(size)))
    reader.skip(size)
    return None


def _read_tensor(reader: _Reader) -> Tensor:
    name, dimensions = reader.string(), reader.number("<I")
    if len(name.encode()) >= 64 or dimensions > 4:
        raise reader.damaged(f"the tensor {name[:64]!r} has too long a name or {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in TENSOR_TYPES:
        raise BadModelFile(f"{reader.path} has the tensor {name!r} of type {kind}, which this llama.cpp does not know.")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    elements = 1
    for length in shape:
        elements *= length
    if elements >= 1 << 63 or (shape[0] if shape else 1) % block:
        raise reader.damaged(f"the tensor {name!r} has the impossible shape {shape}")
    return Tensor(name, shape, type_name, offset, elements, elements // block * block_bytes)


def _check_layout(reader: _Reader, tensors: tuple[Tensor, ...], alignment: Value) -> None:
    """Tensors follow one another, each padded to the alignment, and the file holds them all."""
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.damaged(f"its alignment {alignment!r} is no power of two")
    expected = end = 0
    start = -(-reader.position // alignment) * alignment
    for tensor in tensors:
        if tensor.offset != expected:
            raise reader.damaged(f"the tensor {tensor.name!r} is not where it belongs")
        end = expected + tensor.size_bytes
        expected += -(-tensor.size_bytes // alignment) * alignment
    if tensors and start + end > reader.size:
        raise BadModelFile(
            f"{reader.path} is truncated: it has {reader.size} bytes of {start + end}; download it again."
        )
