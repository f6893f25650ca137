"""The door to other servers: HTTP that is verified, follows redirects by hand, and keeps out of the local network.

A server's words are data: sizes are checked, bodies bounded, and a secret goes to the origin that it is for alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import ssl
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter

from rustllama import __version__
from rustllama.errors import BadRequest, NotFound, RustllamaError, SourceRefused, Unreachable
from rustllama.origin import Origin
from rustllama.pull.public import PublicAdapter, check_public
from rustllama.pull.source import is_safe

CONNECT_S = 10.0
STALL_S = 30.0  # without a byte, after which a connection is given up

_MOST_REDIRECTS = 10
_MOST_BYTES = 32 << 20  # of an answer that is read at once
_CONNECTIONS = 8
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_HEADERS = {"User-Agent": f"rustllama/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}

T = TypeVar("T")


class Web:
    """May be used by several threads at once."""

    def __init__(self, *, public_only: bool = False, connect_s: float = CONNECT_S, stall_s: float = STALL_S) -> None:
        """`public_only` refuses addresses of this machine and of private networks, as for a server that others use."""
        self._public_only = public_only
        self._timeouts_s = (connect_s, stall_s)
        self._secrets: dict[Origin, str] = {}
        self._advice: dict[Origin, str] = {}
        self._session = requests.Session()
        self._session.trust_env = False  # a .netrc would be sent in the place of our own secrets
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = PublicAdapter if public_only else HTTPAdapter
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, adapter(pool_connections=_CONNECTIONS, pool_maxsize=_CONNECTIONS))

    def close(self) -> None:
        self._session.close()

    def trust(self, url: str, authorization: str, advice: str = "") -> None:
        """Sends `authorization`, unless it is empty, to the origin of `url`; `advice` is for whom it refuses."""
        origin = _origin(url)
        if authorization:
            self._secrets[origin] = authorization
        self._advice[origin] = advice

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
        """What 200 or 206 brings; the caller closes it. Raises Unreachable for what may pass, with the time to wait
        where the server names one; BadRequest, NotFound or SourceRefused for the rest.
        """
        for _ in range(_MOST_REDIRECTS):
            response = self._ask(url, headers or {})
            if not response.is_redirect:
                return self._accepted(response)
            response.close()
            url = _followed(url, response.headers["Location"])
        raise BadRequest(f"{_host(url)} redirects without end: name another source.", "model")

    def challenge(self, url: str, headers: Mapping[str, str] | None = None) -> str:
        """How the server wants to be asked, where it answers 401; else empty."""
        with self._ask(url, headers or {}) as response:
            return response.headers.get("WWW-Authenticate", "") if response.status_code == 401 else ""

    def json(self, url: str, as_type: type[T], headers: Mapping[str, str] | None = None) -> tuple[T, str]:
        """The decoded body and the URL of the next page, if any. Raises what `open` does."""
        with self.open(url, headers) as response:
            try:
                decoded = msgspec.json.decode(_read(response), type=as_type)
            except msgspec.MsgspecError:
                raise BadRequest(
                    f"{_host(url)} answers with something else than a description of a model: is it the right place?",
                    "model",
                ) from None
            following = response.links.get("next", {}).get("url", "")
            return decoded, urljoin(url, following) if following else ""

    def text(self, url: str, sha256: str) -> str:
        """A small body with this digest. Raises what `open` does."""
        with self.open(url) as response:
            content = _read(response)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BadRequest(f"What {_host(url)} sends is not what it promised: pull again later.", "model")
        return content.decode("utf-8", "replace")

    def _ask(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        """Any answer, its body still to be read."""
        secret = self._secrets.get(_origin(url))
        proxies = requests.utils.get_environ_proxies(url)
        if proxies and self._public_only:
            check_public(urlsplit(url).hostname or "", urlsplit(url).port or 443)
        try:
            return self._session.get(
                url,
                headers={**_HEADERS, **headers, **({"Authorization": secret} if secret else {})},
                proxies=proxies,
                verify=os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True,
                timeout=self._timeouts_s,
                stream=True,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise unreachable(url, error) from None

    def _accepted(self, response: requests.Response) -> requests.Response:
        if response.status_code in (200, 206):
            return response
        with response:
            raise self._refusal(response)

    def _refusal(self, response: requests.Response) -> RustllamaError:
        url, status = response.url, response.status_code
        host = _host(url)
        if status in _PASSING:
            reason = f"{status} {response.reason or ''}".rstrip()
            return Unreachable(f"{host} answers {reason}: try again later.", _retry_after_s(response))
        if status in (401, 403):
            advice = self._advice.get(_origin(url)) or "name a source that everybody may read."
            return SourceRefused(f"{host} refuses this model ({status}): {advice}", "model")
        if status in (404, 410):
            return NotFound(f"{host} has nothing at {urlsplit(url).path[:200]}: check how the model is named.")
        if status == 416:
            return Unreachable(f"{host} does not have that part of the file: try again.")
        return BadRequest(f"{host} answers {status}: name another source.", "model")


def unreachable(url: str, error: Exception) -> RustllamaError:
    """A connection that could not be made, or broke, as one sentence."""
    host = _host(url)
    if isinstance(error, requests.exceptions.SSLError):
        return BadRequest(
            f"{host} does not prove who it is ({_reason(error)}): take another source, or let "
            "REQUESTS_CA_BUNDLE at the server name a file with the authority to trust.",
            "model",
        )
    inner: Any = error.args[0] if error.args else error
    cause = getattr(inner, "reason", None) or inner
    if isinstance(cause, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)):
        return Unreachable(
            f"{host} cannot be reached: see whether this machine is on the network, and pull again; what is here stays."
        )
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return Unreachable(f"{host} sends nothing any more: pull again later; what is here stays.")
    return Unreachable(f"The connection to {host} broke: pull again; what is here stays.")


def _followed(url: str, location: str) -> str:
    target = urljoin(url, location)
    if not is_safe(target) or (url.startswith("https:") and not target.startswith("https:")):
        raise BadRequest(f"{_host(url)} redirects to what is not https: name another source.", "model")
    return target


def _read(response: requests.Response) -> bytes:
    content = b""
    try:
        for chunk in response.iter_content(1 << 16):
            content += chunk
            if len(content) > _MOST_BYTES:
                raise BadRequest(f"{_host(response.url)} answers with too much: is it the right place?", "model")
    except requests.RequestException as error:
        raise unreachable(response.url, error) from None
    return content


def _retry_after_s(response: requests.Response) -> int | None:
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*", response.headers.get("Retry-After", ""))
    return math.ceil(float(found[1])) if found else None


def _origin(url: str) -> Origin:
    found = urlsplit(url)
    try:
        return Origin.parse(f"{found.scheme}://{found.netloc}")
    except ValueError:
        raise BadRequest(f"{url[:200]!r} cannot be asked: its host is not written as hosts are.", "model") from None


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2][:200]


def _reason(error: BaseException) -> str:
    """What TLS says, out of what requests and urllib3 have wrapped it in."""
    while not isinstance(error, ssl.SSLError):
        inner = getattr(error, "reason", None) or next(iter(error.args), None)
        if not isinstance(inner, BaseException):
            return "TLS fails"
        error = inner
    words = getattr(error, "verify_message", "") or (error.reason or "TLS fails").replace("_", " ").lower()
    return str(words).rstrip(".")
