"""What a model file is: `read` checks a GGUF's header and says what is in it, or in one sentence why it is refused.

Besides the format (`header`) it refuses what is known to kill llama.cpp (`checks`); a child process proves the rest
(`rustllama.probe`). Nothing here maps a file or imports llama.cpp, and every function may block on a disk.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from rustllama.core import FileIdentity, ModelInfo
from rustllama.errors import BadModelFile
from rustllama.gguf import checks
from rustllama.gguf.header import Header, open_regular, read_header
from rustllama.gguf.info import describe
from rustllama.gguf.keys import Keys

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read(path: Path) -> ModelInfo:
    """Reads the header only. Raises BadModelFile: one sentence with the absolute path and what to do."""
    path = Path(os.path.abspath(path))
    headers = _read_parts(path)
    keys = Keys(headers[0])
    checks.check_kind(keys)
    checks.check_hyperparameters(keys)
    checks.check_vocabulary(keys)
    tensors = [tensor for header in headers for tensor in header.tensors]
    checks.check_tensors(path, keys.architecture, tensors)
    return describe(keys, headers, tensors)


def identity(path: Path) -> FileIdentity:
    """Of a split file: the first part's place, the size of all parts and the latest change. Raises BadModelFile."""
    with open_regular(path) as file:
        first = os.fstat(file.fileno())
    rest = []
    for part in _parts(path)[1:]:
        _check_there(part)
        with open_regular(part) as file:
            rest.append(os.fstat(file.fileno()))
    size = sum(status.st_size for status in (first, *rest))
    return FileIdentity(first.st_dev, first.st_ino, size, max(status.st_mtime_ns for status in (first, *rest)))


def digest(info: ModelInfo) -> str:
    """SHA-256 over the sizes, the headers and samples of the tensor data of all parts: 64 hexadecimal digits."""
    result = hashlib.sha256()
    for part in info.parts:
        with open_regular(Path(part)) as file:
            _digest_part(result, file)
    return result.hexdigest()


def _digest_part(result: hashlib._Hash, file: BinaryIO) -> None:
    head, samples, sample = 16 << 20, 256, 16 << 10
    size = os.fstat(file.fileno()).st_size
    result.update(size.to_bytes(8, "little"))
    result.update(file.read(head))
    step = max(sample, (size - head) // samples)
    for offset in range(head, size, step):
        file.seek(offset)
        result.update(file.read(sample))


def _parts(path: Path) -> list[Path]:
    """All parts by the name of the first; the path alone where it is not so named."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if not match or int(match["number"]) != 1:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _read_parts(path: Path) -> list[Header]:
    first = read_header(path)
    count, number = first.values.get("split.count", 0), first.values.get("split.no", 0)
    if not isinstance(count, int) or count < 2:
        return [first]
    match = _SPLIT_NAME.fullmatch(path.name)
    if number != 0:
        name = f"{match['stem']}-00001-of-{match['count']}.gguf" if match else "its first part"
        raise BadModelFile(f"{path} is a later part of a split model; name the first: {path.with_name(name)}.")
    paths = _parts(path)
    if len(paths) != count:
        raise BadModelFile(
            f"{path} is split into {count} parts, so it has to be named like model-00001-of-{count:05d}.gguf."
        )
    return [first, *(_read_part(part, place, count) for place, part in enumerate(paths[1:], 1))]


def _read_part(path: Path, number: int, count: int) -> Header:
    _check_there(path)
    header = read_header(path)
    if header.values.get("split.no") != number:
        raise BadModelFile(f"{path} is not part {number + 1} of {count} of the model; download it again.")
    return header


def _check_there(part: Path) -> None:
    if not part.exists():
        raise BadModelFile(f"{part} is missing: it is a part of a split model, and all parts belong into one folder.")
