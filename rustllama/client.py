"""The console's side of HTTP: typed requests to a rustllama server, and its refusals as RustllamaError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3

from rustllama.errors import (
    AnswerLost,
    Forbidden,
    RustllamaError,
    ServerUnreachable,
    SettingError,
    TooManyRequests,
    Unauthorized,
)
from rustllama.origin import is_loopback
from rustllama.replies import Listing, LoadedModel, Message, Model, ModelCard, Pulled, Reply, Version
from rustllama.settings import DEFAULT_PORT, parse_address

API_KEY = "RUSTLLAMA_API_KEY"
CA = "RUSTLLAMA_CA"

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0  # of answers that need no model; the others may take as long as they like

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}

_NO_LISTENER = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)

_KEY_REFUSED = (Unauthorized, Forbidden, TooManyRequests)

T = TypeVar("T")


class _LoadedModels(msgspec.Struct):
    models: list[LoadedModel]


class _Failure(msgspec.Struct):
    error: str


class _Status(msgspec.Struct):
    status: str


def base_url(address: str) -> str:
    """`scheme://host:port/prefix` of a RUSTLLAMA_HOST in any form; wildcards become loopback. Raises SettingError."""
    scheme, separator, rest = address.strip().rpartition("://")
    try:
        host, port = parse_address(address)
        prefix = urlsplit(f"//{rest}").path.rstrip("/") if "/" in rest else ""
    except ValueError as error:
        raise SettingError(f"RUSTLLAMA_HOST={address!r} is not valid: {error}.") from None
    host = _WILDCARDS.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme if separator else 'http'}://{shown}:{port or DEFAULT_PORT}{prefix}"


class Client:
    """Requests to the server at `address`, any form of RUSTLLAMA_HOST; empty is the default address.

    `ca` is the path of PEM certificates that are trusted in the place of the usual ones. Every method raises
    ServerUnreachable where nothing listens, else RustllamaError with the server's own sentence. `advice` is what to do
    where nothing listens; empty: start a server.
    """

    def __init__(self, address: str = "", *, api_key: str = "", ca: str = "", advice: str = "") -> None:
        """Raises SettingError."""
        self.url = base_url(address or "localhost")
        self.is_local = is_loopback(urlsplit(self.url).hostname or "")
        self.api_key = api_key
        self._ca = ca
        start = "start one with `rustllama serve`" if self.is_local else "start `rustllama serve` there"
        self._advice = advice or f"{start}, or set RUSTLLAMA_HOST to another address"
        if not (api_key.isascii() and api_key.isprintable()):
            raise SettingError(
                f"{API_KEY} has characters that no API key has: set it to what `rustllama key add` said."
            )
        if ca and not os.path.isfile(ca):
            raise SettingError(f"{CA}={ca!r} is no file: name one with the certificates to trust, in PEM.")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Client:
        """As the user's variables say. Raises SettingError."""
        api_key, ca = environ.get(API_KEY, "").strip(), environ.get(CA, "").strip()
        return cls(environ.get("RUSTLLAMA_HOST", ""), api_key=api_key, ca=os.path.expanduser(ca))

    def version(self) -> Version:
        """Also tells whether it is a rustllama server that answers: RustllamaError if not."""
        try:
            return self._call("GET", "/api/version", as_type=Version)
        except (ServerUnreachable, *_KEY_REFUSED):
            raise
        except RustllamaError:
            raise RustllamaError(
                f"What answers at {self.url} is no rustllama server: stop it or set RUSTLLAMA_HOST to another address."
            ) from None

    def models(self) -> list[Model]:
        return self.listing().models

    def listing(self) -> Listing:
        return self._call("GET", "/api/list", as_type=Listing)

    def loaded(self) -> list[LoadedModel]:
        return self._call("GET", "/api/ps", as_type=_LoadedModels).models

    def show(self, model: str) -> ModelCard:
        return self._call("POST", "/api/show", {"model": model}, as_type=ModelCard)

    def create(self, name: str, path: str) -> None:
        """Registers the GGUF at `path`, absolute on the server's machine; proving it may take minutes."""
        self._call("POST", "/api/create", {"name": name, "modelpath": path}, as_type=_Status, read_timeout_s=None)

    def pull(self, source: str, name: str = "") -> Generator[Pulled, None, None]:
        """Fetches the model and registers it, as `name` if there is one; lines as they come, the last with its name.

        Closing the generator ends the pull, unless others wait for it; the next one goes on where it stopped.
        """
        body = {"model": source, "as": name, "stream": True}
        with self._request("POST", "/api/pull", body, read_timeout_s=None) as response, self._translated():
            done = False
            for line in _lines(response):
                pulled = self._decoded(line, Pulled)
                if pulled.error is not None:
                    raise RustllamaError(pulled.error)
                yield pulled
                done = pulled.status == "success"
            if not done:
                raise self._broken()

    def delete(self, name: str) -> None:
        self._call("DELETE", "/api/delete", {"name": name}, as_type=_Status)

    def load(self, model: str, options: Mapping[str, object] | None = None) -> Generator[Reply, None, None]:
        """Loads the model and lets the server check `options`; see `chat`."""
        return self.chat(model, (), options)

    def unload(self, model: str, *, forget: bool = False) -> None:
        """`forget`: its computed prompts leave with it."""
        body = {"model": model, "messages": (), "keep_alive": 0, "forget": forget}
        self._call("POST", "/api/chat", body, as_type=Reply)

    def chat(
        self, model: str, messages: Sequence[Message], options: Mapping[str, object] | None = None
    ) -> Generator[Reply, None, None]:
        """The lines of a streamed answer as they come, the last with `done`.

        Closing the generator closes the connection, which ends the server's work. A stream that breaks off raises
        AnswerLost.
        """
        body = {"model": model, "messages": messages, "options": options or {}, "stream": True, "progress": True}
        with self._request("POST", "/api/chat", body, read_timeout_s=None) as response, self._translated():
            done = False
            for line in _lines(response):  # to the very end: a connection that is left early looks like a hang-up
                reply = self._decoded(line, Reply)
                if reply.error is not None:
                    raise RustllamaError(reply.error)
                yield reply
                done = reply.done
            if not done:
                raise self._broken()

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        as_type: type[T],
        read_timeout_s: float | None = READ_TIMEOUT_S,
    ) -> T:
        with self._request(method, path, body, read_timeout_s=read_timeout_s) as response, self._translated():
            return self._decoded(response.content, as_type)

    def _request(
        self, method: str, path: str, body: Mapping[str, object] | None, *, read_timeout_s: float | None
    ) -> requests.Response:
        """A 200 whose body is still to be read.

        Each request has a connection of its own: one that was kept may be closed by the server at any moment.
        """
        with self._translated(), requests.Session() as session:
            session.trust_env = not self.is_local  # a proxy cannot reach this machine's loopback
            response = session.request(
                method,
                self.url + path,
                data=None if body is None else _encoded(body),
                headers={"Content-Type": "application/json"},
                auth=self._sign if self.api_key else None,
                verify=self._ca or True,
                timeout=(CONNECT_TIMEOUT_S, read_timeout_s),
                stream=True,
                allow_redirects=False,
            )
            if response.status_code != 200:
                raise self._refusal(response)
            return response

    def _refusal(self, response: requests.Response) -> RustllamaError:
        with response, contextlib.suppress(msgspec.MsgspecError):
            text = msgspec.json.decode(response.content, type=_Failure).error
            if response.status_code == Unauthorized.status:
                text = self._locked_out()
            kinds = {kind.status: kind for kind in _KEY_REFUSED}
            return kinds.get(response.status_code, RustllamaError)(text)
        return self._stranger(f"status {response.status_code}")

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.api_key}"
        return request

    def _locked_out(self) -> str:
        wants = "does not take the API key in" if self.api_key else "wants an API key: set"
        return f"{self.url} {wants} {API_KEY}; `rustllama key add NAME` there makes one."

    def _decoded(self, content: bytes, as_type: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=as_type)
        except msgspec.MsgspecError:
            raise self._stranger("something that is not its JSON") from None

    def _stranger(self, answer: str) -> RustllamaError:
        return RustllamaError(f"{self.url} answered with {answer}: is it a rustllama server? RUSTLLAMA_HOST names it.")

    def _broken(self) -> AnswerLost:
        return AnswerLost(
            f"The connection to {self.url} broke before the answer was complete, as when the server crashed: try again."
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Whatever requests raises, as one sentence."""
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise RustllamaError(
                f"No connection to {self.url}: {_reason(error)}; {CA} names a file of certificates to trust."
            ) from None
        except requests.exceptions.ProxyError as error:
            raise RustllamaError(f"No connection to {self.url}: {_reason(error)}.") from None
        except requests.exceptions.ReadTimeout:
            raise RustllamaError(f"{self.url} did not answer within {READ_TIMEOUT_S:.0f} seconds: try again.") from None
        except requests.RequestException as error:
            if isinstance(_cause(error), _NO_LISTENER):
                raise self._unreachable() from None
            raise self._broken() from None

    def _unreachable(self) -> ServerUnreachable:
        return ServerUnreachable(f"No server answers at {self.url}: {self._advice}.")


def _encoded(body: Mapping[str, object]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise RustllamaError("The text or path is not valid UTF-8.") from None


def _lines(response: requests.Response) -> Iterator[bytes]:
    """The complete lines of a body as its chunks arrive; what follows the last newline is broken and left out."""
    rest = b""
    for chunk in response.iter_content(None):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from filter(None, lines)


def _cause(error: requests.RequestException) -> object:
    """What urllib3 met, below the MaxRetryError it wraps it in."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", None) or inner


def _reason(error: requests.RequestException) -> str:
    return str(_cause(error)).splitlines()[0].rstrip(".")
