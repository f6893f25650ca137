"""API keys at the door: whether a request needs one, whose it is, what that may, and how much of it."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hmac import compare_digest

from flask import has_request_context, request

from rustllama.api.access import call_of
from rustllama.bridge import RLock, offload
from rustllama.errors import Forbidden, RustllamaError, TooManyRequests, Unauthorized
from rustllama.keys import ApiKey, digest_of
from rustllama.registry import Registry, canonical
from rustllama.settings import Settings

_FRESH_S = 1.0  # after which the database is asked again
_FOR_ALL = ("/", "/health")
_READING = ("GET", "HEAD")
_CHATTING = ("/api/chat", "/api/generate", "/api/show", "/v1/chat/completions")
_MANAGING = ("/api/blobs/<digest>",)  # reading, too: who asks for a digest learns what others have
_OF_ALL_MODELS = ("/metrics",)
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_LOG = logging.getLogger("rustllama")


@dataclass(slots=True)
class Account:
    """What a key has left in this process: a token bucket that holds a minute's requests, and those that run."""

    key: ApiKey
    tokens: float
    filled_s: float
    running: int = 0

    @classmethod
    def full(cls, key: ApiKey, now_s: float) -> Account:
        return cls(key, float(key.rate_per_min or 0), now_s)

    def enter(self, now_s: float) -> None:
        """A request begins; `leave` ends it. Raises TooManyRequests."""
        key = self.key
        if key.concurrency is not None and self.running >= key.concurrency:
            limit = "one request" if key.concurrency == 1 else f"{key.concurrency} requests"
            raise TooManyRequests(f"The API key '{key.name}' may have {limit} at a time: wait until one has ended.")
        if key.rate_per_min is not None:
            self._take(key.rate_per_min, now_s)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def _take(self, rate_per_min: int, now_s: float) -> None:
        self.tokens = min(rate_per_min, self.tokens + (now_s - self.filled_s) * rate_per_min / 60)
        self.filled_s = now_s
        if self.tokens < 1:
            wait_s = math.ceil((1 - self.tokens) * 60 / rate_per_min)
            raise TooManyRequests(
                f"The API key '{self.key.name}' may make {rate_per_min} requests a minute: try again in {wait_s} s.",
                wait_s,
            )
        self.tokens -= 1


class Keys:
    """Asked in the hub, once for each request. The keys are those of the database, read at most once a second."""

    def __init__(self, settings: Settings, registry: Registry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._wanted = settings.require_key or (settings.beyond_loopback and not settings.insecure_no_auth)
        self._own = [ApiKey("console", digest_of(settings.console_key), "")] if settings.console_key else []
        self._accounts: Mapping[str, Account] | None = None  # by digest; None before the first look
        self._stale_s = -math.inf
        self._reading = RLock()

    def admit(self) -> None:
        """Lets the current request in, and notes whose it is; the body is not read.

        A key is wanted where there is one, or where the settings say so. Raises Unauthorized, Forbidden,
        TooManyRequests, and what a database raises that never could be read.
        """
        rule = request.url_rule.rule if request.url_rule else ""
        if rule in _FOR_ALL or request.method == "OPTIONS":
            return
        accounts = self._current()
        if not accounts and not self._wanted:
            return
        account = _owner(accounts)
        call = call_of(request.environ)
        call.key = account.key
        _check_rights(account.key, rule)
        account.enter(self._clock())
        call.release = account.leave

    def _current(self) -> Mapping[str, Account]:
        if self._accounts is None or self._clock() >= self._stale_s:
            with self._reading:  # one looks, for all who came meanwhile
                if self._accounts is None or self._clock() >= self._stale_s:
                    self._accounts = self._read(self._accounts)
                    self._stale_s = self._clock() + _FRESH_S
        return self._accounts

    def _read(self, known: Mapping[str, Account] | None) -> Mapping[str, Account]:
        try:
            keys = self._own + offload(self._registry.api_keys)
        except RustllamaError as error:
            if known is None:
                raise
            _LOG.warning("the API keys could not be read, and those that were known go on: %s", error)
            return known
        now_s = self._clock()
        return {key.digest: (known or {}).get(key.digest) or Account.full(key, now_s) for key in keys}


def may_use_all() -> bool:
    """Whether the current request's key, if any, is for all models."""
    key = _current_key()
    return key is None or not key.models


def may_use(name: str) -> bool:
    """Whether the current request's key is for this model; outside of requests everything is."""
    key = _current_key()
    return key is None or key.allows(canonical(name))


def check_model(name: str) -> None:
    """Raises Forbidden, which does not tell whether there is such a model."""
    key = _current_key()
    if key is not None and not key.allows(canonical(name)):
        raise Forbidden(f"The API key '{key.name}' may not use the model '{name}': it is for {', '.join(key.models)}.")


def _current_key() -> ApiKey | None:
    return call_of(request.environ).key if has_request_context() else None


def _owner(accounts: Mapping[str, Account]) -> Account:
    """Raises Unauthorized."""
    bearer = _BEARER.fullmatch(request.headers.get("Authorization", ""))
    secret = bearer[1] if bearer else request.headers.get("X-Api-Key", "")
    if not secret:
        raise Unauthorized(
            "This server wants an API key: send it as 'Authorization: Bearer KEY'; `rustllama key add NAME` at the "
            "server makes one."
        )
    given = digest_of(secret)
    found = [account for digest, account in accounts.items() if compare_digest(digest, given)]
    if not found:
        raise Unauthorized("That is no API key of this server: `rustllama key add NAME` at the server makes one.")
    return found[0]


def _check_rights(key: ApiKey, rule: str) -> None:
    """What is not known to be harmless needs all rights. Raises Forbidden."""
    harmless = rule in _CHATTING or (request.method in _READING and rule not in _MANAGING)
    if not key.may_manage and not harmless:
        raise Forbidden(f"The API key '{key.name}' may chat and not {request.method[:20]} {request.path[:100]}.")
    if key.models and rule in _OF_ALL_MODELS:
        raise Forbidden(f"The API key '{key.name}' may not GET {rule}, which tells of all models.")
