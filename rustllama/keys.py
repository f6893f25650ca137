"""API keys: how one is made, and what is kept of it."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

from rustllama.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may use a server, and how much of it; None is no limit. Of the key itself only the digest is kept."""

    name: str
    digest: str  # see `digest_of`
    created_at: str  # RFC 3339 with fraction and zone
    models: tuple[str, ...] = ()  # canonical names; empty: all models
    rate_per_min: int | None = None  # requests
    concurrency: int | None = None  # requests
    may_manage: bool = True  # create and delete models, not only chat

    def allows(self, canonical_name: str) -> bool:
        return not self.models or canonical_name in self.models


def new_secret() -> str:
    """A key, of 256 random bits."""
    return "rl_" + secrets.token_urlsafe(_SECRET_BYTES)


def digest_of(secret: str) -> str:
    """SHA-256 in hex. A slow hash protects what can be guessed, which 256 random bits cannot."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def check_key_name(name: str) -> str:
    """Names stand in the log. Raises BadRequest with the grammar in words."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name[:80]!r} is not a name for a key: use letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit, at most 64 characters.",
            "name",
        )
    return name
