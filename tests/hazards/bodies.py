"""Bodies that are wrong in many ways, of which each follows from a seed; and one connection that carries them all."""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 60
# All that any endpoint reads. No such model is there: what is understood by chance is a 404.
WELL = {
    "model": "nosuch",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "é世🦙"}]}],
    "prompt": "hello",
    "system": "Be brief.",
    "template": "{{ messages }}",
    "modelpath": "/nosuch.gguf",
    "stream": True,
    "keep_alive": "5m",
    "max_tokens": 3,
    "temperature": 0.5,
    "stream_options": {"include_usage": True},
    "options": {"num_predict": 3, "seed": 7, "stop": ["a", "b"], "top_p": 0.9},
}
STRANGE: tuple[object, ...] = (
    None,
    True,
    0,
    -1,
    1 << 31,
    1 << 64,
    -(1 << 63) - 1,
    1e308,
    "",
    "x" * 5_000,
    [],
    [[]],
    {},
    {"a": {}},
    ["a"],
)
TYPES = (
    *("application/json", "application/json; charset=utf-16", "text/plain", "text/html", "application/octet-stream"),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data", "", "/", "é" * 99),
)
ENCODINGS = ("", "gzip", "br", "deflate, gzip", "identity", "chunked", "zstd;q=x")

Body = dict[str, Any]
Wrong = Callable[[random.Random, Body], bytes]


@dataclass(frozen=True, slots=True)
class Sent:
    """What stands behind the line of a request, and its headers."""

    headers: Mapping[str, str]
    data: bytes
    is_last: bool = False  # nothing can follow on its connection

    def request(self, method: str, path: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + self.data


def malformed(seed: int) -> Sent:
    rng = random.Random(seed)
    body = json.loads(json.dumps(WELL))
    data = rng.choice(_WRONG)(rng, body)
    headers = {"Host": "localhost"}
    if rng.random() < 0.8:
        headers["Content-Type"] = rng.choice(TYPES)
    if rng.random() < 0.2:
        headers["Content-Encoding"] = rng.choice(ENCODINGS)
    if rng.random() < 0.2:
        return Sent({**headers, "Transfer-Encoding": "chunked"}, _chunked(rng, data), is_last=True)
    if rng.random() < 0.05:
        length = rng.choice(
            [str(len(data) + 9), "-1", "1e3", "0x10", "", "9" * 30, f"{len(data)}, {len(data)}", "\xb2"]
        )
        return Sent({**headers, "Content-Length": length}, data, is_last=True)
    return Sent({**headers, "Content-Length": str(len(data))}, data)


def _cut(rng: random.Random, body: Body) -> bytes:
    whole = _dumped(body)
    return whole[: rng.randrange(len(whole))]


def _flipped(rng: random.Random, body: Body) -> bytes:
    """One value of another type, however deep."""
    parent: Any = body
    while True:
        place = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if not isinstance(parent[place], (dict, list)) or not parent[place] or rng.random() < 0.4:
            parent[place] = rng.choice(STRANGE)
            return _dumped(body)
        parent = parent[place]


def _in_another_encoding(rng: random.Random, body: Body) -> bytes:
    text = json.dumps(body, ensure_ascii=False)
    return text.encode(rng.choice(["utf-16", "utf-32", "utf-16-be", "cp037", "utf-7", "latin-1"]), "replace")


def _damaged(rng: random.Random, body: Body) -> bytes:
    data = bytearray(_dumped(body))
    for _ in range(rng.choice([1, 1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _with_a_key_twice(rng: random.Random, body: Body) -> bytes:
    name = rng.choice(list(body))
    pieces = [json.dumps({key: value})[1:-1] for key, value in body.items()]
    pieces.insert(rng.randrange(len(pieces)), json.dumps({name: rng.choice(STRANGE)})[1:-1])
    return ("{" + ", ".join(pieces) + "}").encode()


def _nested(rng: random.Random, body: Body) -> bytes:
    depth = rng.choice([65, 500, 5_000, 50_000])
    left, right = rng.choice([("[", "]"), ('{"a":', "}")])
    value = left * depth + rng.choice(["", "1"]) + right * rng.choice([0, depth, depth + 1])
    return _in_the_place_of_a_value(rng, body, value.encode())


def _number(rng: random.Random, body: Body) -> bytes:
    number = rng.choice(
        ["9" * 5_000, "-" + "9" * 400, "1e999", "-1e999", "1e-999", "0x10", "NaN", "-Infinity", "01", "1."]
    )
    return _in_the_place_of_a_value(rng, body, number.encode())


def _text(rng: random.Random, body: Body) -> bytes:
    text = rng.choice(
        [rb'"\ud800"', rb'"\udc00\ud800"', rb'"\u00"', rb'"\x"', b'"\xed\xa0\x80"', b'"\xff"', b'"\n"', b'"\0']
    )
    return _in_the_place_of_a_value(rng, body, text)


def _in_the_place_of_a_value(rng: random.Random, body: Body, value: bytes) -> bytes:
    body[rng.choice(list(body))] = "HERE"
    return _dumped(body).replace(b'"HERE"', value)


def _another_value(rng: random.Random, _: Body) -> bytes:
    return _dumped(rng.choice(STRANGE))


def _noise(rng: random.Random, _: Body) -> bytes:
    return rng.randbytes(rng.choice([1, 7, 100, 5_000]))


def _form(rng: random.Random, _: Body) -> bytes:
    return rng.choice(
        [b"model=nosuch&prompt=x", b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--x--']
    )


def _dumped(value: object) -> bytes:
    return json.dumps(value).encode()


_WRONG: tuple[Wrong, ...] = (
    *(_cut, _flipped, _in_another_encoding, _damaged, _with_a_key_twice, _nested),
    *(_number, _text, _another_value, _noise, _form),
)


def _chunked(rng: random.Random, data: bytes) -> bytes:
    """Well, or not at all."""
    size = rng.choice(["%x", "%X;a=b", "-%x", "0x%x", "%x\n", "+%x", "%xg", "g%x", " %x", "fffffffffffffffff%x"]) % len(
        data
    )
    end = rng.choice(
        [b"\r\n0\r\n\r\n", b"\r\n0\r\n\r\n", b"0\r\n\r\n", b"\r\n-1\r\n\r\n", b"\r\n0\r\nTrailer: x\r\n\r\n"]
    )
    return size.encode() + b"\r\n" + data + end if data else b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content_type: str
    data: bytes

    @property
    def is_refusal(self) -> bool:
        """A 4xx with a JSON object that has an `error`."""
        if not 400 <= self.status < 500 or self.content_type != "application/json" or b"Traceback" in self.data:
            return False
        return bool(json.loads(self.data)["error"])


class Line:
    """A connection that stays open as long as the server has it so, and is opened again."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._address = (where.hostname or "", where.port or 0)
        self._socket: socket.socket | None = None

    def ask(self, request: bytes, *, is_last: bool = False) -> Answer:
        """`is_last`: nothing else is sent, and nothing that the request may still announce."""
        client = self._socket or socket.create_connection(self._address, PATIENCE_S)
        client.sendall(request)
        if is_last:
            client.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(client)
        response.begin()
        answer = Answer(response.status, response.headers.get("Content-Type", ""), response.read())
        self._socket = client
        if response.will_close or is_last:
            self.close()
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
