"""The web pages that may use this server: those it is told of, and those that come from where it runs itself."""

from __future__ import annotations

import re

from flask import Response
from werkzeug.datastructures import Headers

from rustllama.errors import Forbidden
from rustllama.origin import Origin
from rustllama.settings import Settings

_OPAQUE = "null"  # the origin of local files and sandboxed frames
_ANY = "*"
_WITHOUT_ASKING = ("same-origin", "none")  # none: the user's own doing, like an address typed in
_SHOWN_CHARACTERS = 80
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "DELETE, GET, HEAD, POST",
    "Access-Control-Max-Age": "7200",  # seconds: the most that Chromium keeps
}
_EXPOSED = "Retry-After, X-Request-Id"
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:[ \t]*,[ \t]*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)


class Origins:
    """Refuses what a browser sends for a foreign page, and speaks CORS with those of RUSTLLAMA_ORIGINS alone."""

    def __init__(self, settings: Settings) -> None:
        self._words = frozenset(settings.origins) & {_ANY, _OPAQUE}
        self._configured = frozenset(Origin.parse(text) for text in settings.origins if text not in self._words)

    def check(self, headers: Headers) -> None:
        """Raises Forbidden. A request that has neither `Origin` nor `Sec-Fetch-Site` comes from no browser."""
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        if self._is_configured(origin):
            return
        if origin is not None and not _is_near(origin, headers.get("Host", "")):
            raise Forbidden(_refusal(origin))
        if site is not None and site not in _WITHOUT_ASKING:
            page = "its origin, like https://chat.example.com," if origin is None else _shown(origin)
            raise Forbidden(
                f"A browser asks for a page of another site ('Sec-Fetch-Site' is {_shown(site)}): "
                f"add {page} to RUSTLLAMA_ORIGINS at the server if that page may use it."
            )

    def is_preflight(self, headers: Headers) -> bool:
        """Of an OPTIONS request: whether a page that may use the server asks what else it may."""
        return "Access-Control-Request-Method" in headers and self._is_configured(headers.get("Origin"))

    def preflight(self, headers: Headers) -> Response:
        """What a configured page may send: any header, as the guard's answer does not depend on them."""
        response = Response(status=204, headers=_PREFLIGHT)
        del response.headers["Content-Type"]
        names = headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(names):
            response.headers["Access-Control-Allow-Headers"] = names
        if headers.get("Access-Control-Request-Private-Network") == "true":
            response.headers["Access-Control-Allow-Private-Network"] = "true"
        return response

    def mark(self, response: Response, headers: Headers) -> Response:
        """Lets a configured page read the response, whatever it is."""
        if self._configured or self._words:
            response.vary.add("Origin")
        origin = headers.get("Origin")
        if origin is not None and self._is_configured(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response

    def _is_configured(self, header: str | None) -> bool:
        """Without an `Origin` only `*` covers a page, whichever it is; `null` has to be said."""
        if header is None:
            return _ANY in self._words
        if header == _OPAQUE:
            return _OPAQUE in self._words
        origin = _parsed(header)
        return origin is not None and (_ANY in self._words or origin in self._configured)


def _parsed(header: str) -> Origin | None:
    try:
        return Origin.parse(header)
    except ValueError:
        return None


def _is_near(header: str, host: str) -> bool:
    """Whether a page comes from loopback, or from the host that it asks; a proxy may have spoken TLS with it."""
    origin = _parsed(header)
    if origin is None or origin.scheme not in ("http", "https"):
        return False
    return origin.is_loopback or origin == _parsed(f"{origin.scheme}://{host}")


def _refusal(header: str) -> str:
    if header == _OPAQUE:
        return (
            "A page without an origin, like a local file, may not use this server: "
            "serve it by HTTP and add its origin to RUSTLLAMA_ORIGINS at the server."
        )
    return (
        f"Pages of {_shown(header)} may not use this server: "
        "add their origin, like https://chat.example.com, to RUSTLLAMA_ORIGINS at the server if they may."
    )


def _shown(header: str) -> str:
    return repr(header[:_SHOWN_CHARACTERS])
