"""Hugging Face's API as it is documented (https://huggingface.co/docs/hub/api), for the repositories of a Host."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from tests.hosts import Host

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish(host: Host, id: str, files: Mapping[str, bytes], *, license: str = "apache-2.0") -> None:
    """Makes a repository of these files; those of GGUF are in LFS, as they are there."""
    host.json(
        f"/api/models/{id}/revision/main", {"id": id, "sha": COMMIT, "cardData": {"license": license}, "tags": []}
    )
    host.json(f"/api/models/{id}/tree/{COMMIT}", [_item(path, body) for path, body in files.items()])
    for path, body in files.items():
        host.files[f"/{id}/resolve/{COMMIT}/{path}"] = body


def _item(path: str, body: bytes) -> dict[str, object]:
    item: dict[str, object] = {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body), "path": path}
    if path.endswith(".gguf"):
        item["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 135}
    return item
