"""What a URL offers: one GGUF file, or all parts of a split one whose first part it names."""

from __future__ import annotations

import re

from rustllama.errors import BadRequest
from rustllama.pull.offer import File, Offer
from rustllama.pull.source import Link

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_MOST_PARTS = 999


def ask(source: Link) -> Offer:
    """Raises BadRequest."""
    path, mark, query = source.url.partition("?")
    split = _SPLIT.search(path)
    if split is None:
        return Offer(source.origin, (File(source.url),))
    number, count = int(split[1]), int(split[2])
    if number != 1 or not 1 <= count <= _MOST_PARTS:
        raise BadRequest("That is a part of a split model: name its first part, -00001-of-…", "model")
    names = (
        f"{path[: split.start()]}-{part:05d}-of-{count:05d}{path[split.start(3) :]}" for part in range(1, count + 1)
    )
    return Offer(source.origin, tuple(File(name + mark + query) for name in names))
