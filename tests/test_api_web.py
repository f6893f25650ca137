"""What a browser may send here, by the host it calls and the page it asks for; and CORS for the pages that may."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from werkzeug.test import create_environ, run_wsgi_app

from rustllama.api.hosts import Hosts
from rustllama.errors import Forbidden, InternalError, SettingError
from rustllama.settings import Settings
from tests.conftest import Server
from tests.fakes import House, build_house, refused

APP = "https://app.example.com"  # a configured page; the matrix's server is configured as chat.example.com too
EXTENSION = "chrome-extension://abcdefghijklmnop"
EVIL = "https://evil.com"

# The verdict for each Sec-Fetch-Site: ok, or which of the three headers it is refused for. A dash is a header that is
# not there, two quotes an empty one.
MATRIX = """
Host                             Origin                                -      same-origin none   same-site cross-site
localhost:11435                  -                                     ok     ok          ok     site      site
LOCALHOST.                       -                                     ok     ok          ok     site      site
127.0.0.1:11435                  -                                     ok     ok          ok     site      site
127.9.9.9                        -                                     ok     ok          ok     site      site
[::1]:11435                      -                                     ok     ok          ok     site      site
box.localhost:8080               -                                     ok     ok          ok     site      site
box.local                        -                                     ok     ok          ok     site      site
host.docker.internal:11435       -                                     ok     ok          ok     site      site
192.168.1.7:11435                -                                     ok     ok          ok     site      site
[fd00::7]:11435                  -                                     ok     ok          ok     site      site
Chat.Example.com                 -                                     ok     ok          ok     site      site
chat.example.com:8443            -                                     ok     ok          ok     site      site
-                                -                                     host   host        host   host      host
""                               -                                     host   host        host   host      host
evil.com:11435                   -                                     host   host        host   host      host
localhost.evil.com               -                                     host   host        host   host      host
8.8.8.8:11435                    -                                     host   host        host   host      host
[2001:db8::1]:11435              -                                     host   host        host   host      host
evil.com                         http://evil.com                       host   host        host   host      host
evil.com                         https://app.example.com               host   host        host   host      host
localhost:11435                  http://localhost:11435                ok     ok          ok     site      site
localhost:11435                  https://localhost:3000                ok     ok          ok     site      site
localhost:11435                  http://127.0.0.1                      ok     ok          ok     site      site
localhost:11435                  http://[::1]:8080                     ok     ok          ok     site      site
localhost:11435                  http://app.localhost                  ok     ok          ok     site      site
chat.example.com                 https://chat.example.com              ok     ok          ok     site      site
chat.example.com                 http://chat.example.com:80            ok     ok          ok     site      site
chat.example.com:443             https://chat.example.com              ok     ok          ok     site      site
192.168.1.7:11435                http://192.168.1.7:11435              ok     ok          ok     site      site
localhost:11435                  https://app.example.com               ok     ok          ok     ok        ok
localhost:11435                  https://APP.example.com:443           ok     ok          ok     ok        ok
localhost:11435                  chrome-extension://abcdefghijklmnop   ok     ok          ok     ok        ok
localhost:11435                  http://app.example.com                origin origin      origin origin    origin
localhost:11435                  https://app.example.com:8443          origin origin      origin origin    origin
localhost:11435                  https://app.example.com.evil.com      origin origin      origin origin    origin
localhost:11435                  https://localhost.evil.com            origin origin      origin origin    origin
localhost:11435                  chrome-extension://ponmlkjihgfedcba   origin origin      origin origin    origin
localhost:11435                  ftp://localhost                       origin origin      origin origin    origin
localhost:11435                  null                                  origin origin      origin origin    origin
localhost:11435                  ""                                    origin origin      origin origin    origin
localhost:11435                  https://app.example.com/              origin origin      origin origin    origin
localhost:11435                  https://app.example.com,http://x      origin origin      origin origin    origin
chat.example.com                 https://chat.example.com:8443         origin origin      origin origin    origin
chat.example.com:443             http://chat.example.com               origin origin      origin origin    origin
192.168.1.7:11435                http://192.168.1.8:11435              origin origin      origin origin    origin
"""
TITLE, *ROWS = (line.split() for line in MATRIX.strip().splitlines())
CELLS = [(*row[:2], site, verdict) for row in ROWS for site, verdict in zip(TITLE[2:], row[2:], strict=True)]
REFUSALS = {  # what its sentence names, and what it does not
    "host": ("RUSTLLAMA_HOSTS", "Sec-Fetch-Site"),
    "origin": ("RUSTLLAMA_ORIGINS", "Sec-Fetch-Site"),
    "site": ("'Sec-Fetch-Site'", "RUSTLLAMA_HOSTS"),
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Nothing here changes it."""
    return build_house(tmp_path_factory.mktemp("guarded"), hosts=("chat.example.com",), origins=(APP, EXTENSION))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path, origins=(APP,))


def asked(house: House, headers: dict[str, str], path: str = "/api/version", **request: Any) -> tuple[int, str]:
    """Status and sentence of a request with just these headers; not even `Host` is added."""
    environ = create_environ(path, **request)
    del environ["HTTP_HOST"]
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
    body, status, _ = run_wsgi_app(house.app.wsgi_app, environ)
    return int(status[:3]), json.loads(b"".join(body)).get("error", "")


@pytest.mark.parametrize(("host", "origin", "site", "verdict"), CELLS)
def test_who_may_ask(guarded: House, host: str, origin: str, site: str, verdict: str) -> None:
    given = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site}
    headers = {name: value.strip('"') for name, value in given.items() if value != "-"}
    status, sentence = asked(guarded, headers)
    assert status == (200 if verdict == "ok" else 403), sentence
    if verdict != "ok":
        named, unnamed = REFUSALS[verdict]
        assert named in sentence
        assert unnamed not in sentence


PRIVATE = ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.0", "169.254.169.1", "100.64.0.1", "[fe80::1]"]
NOT_PRIVATE = ["172.32.0.1", "192.169.0.1", "11.0.0.1", "100.128.0.1", "169.253.0.1", "[fec0::1]", "0.0.0.0", "[::]"]
NO_HOSTS = [
    "local",
    "notlocal",
    ".local",
    "chat.example.com.evil.com",
    "notchat.example.com",
    "localhost,evil.com",
    "me@localhost",
    "localhost/",
    "localhost:http",
    "localhost:",
    "http://localhost",
    "[::1",
    "[localhost]",
    "127.0.0.1.evil.com",
    "2130706433",
    "l\xf6calhost",
    "localhost\n",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_a_private_address_is_a_host(guarded: House, host: str) -> None:
    assert asked(guarded, {"Host": f"{host}:11435"}) == (200, "")


@pytest.mark.parametrize("host", NOT_PRIVATE + NO_HOSTS)
def test_what_is_not_quite_a_host_of_ours_is_refused(guarded: House, host: str) -> None:
    assert asked(guarded, {"Host": host})[0] == 403


def test_a_refused_host_is_named_shortly_and_in_plain_characters(guarded: House) -> None:
    assert asked(guarded, {"Host": "evil.com:1"})[1] == (
        "This server is not known as 'evil.com:1': use its own name or address, "
        "or add that host to RUSTLLAMA_HOSTS at the server."
    )
    sentence = asked(guarded, {"Host": "\x1b[2J" + "x" * 9000})[1]
    assert sentence.isprintable()
    assert len(sentence) < 250


@pytest.mark.parametrize("host", ["Box", "box.lan:11435", "BOX.LAN.", "10.1.2.3"])
def test_the_machines_name_counts_with_and_without_its_domain(host: str) -> None:
    Hosts(Settings(), machine="Box.lan").check(host)


@pytest.mark.parametrize("host", ["box.evil.com", "box.lan.evil.com", "lan"])
def test_another_domain_than_the_machines_does_not_count(host: str) -> None:
    with pytest.raises(Forbidden):
        Hosts(Settings(), machine="Box.lan").check(host)


def test_the_machines_name_is_what_the_system_says(guarded: House) -> None:
    assert asked(guarded, {"Host": socket.gethostname()}) == (200, "")


@pytest.mark.parametrize(
    ("bound", "host"),
    [("0.0.0.0", "0.0.0.0:11435"), ("2001:DB8:0::1", "[2001:db8::1]:11435"), ("Llm.example.com", "llm.example.com")],
)
def test_the_address_that_is_bound_is_a_host(bound: str, host: str) -> None:
    Hosts(Settings(host=(bound, 11435)), machine="box").check(host)


@pytest.mark.parametrize("host", ["evil.com", "", "a b"])
def test_a_star_lets_any_host_pass_but_no_page_of_another_one(tmp_path: Path, host: str) -> None:
    house = build_house(tmp_path, hosts=("*",))
    assert asked(house, {"Host": host}) == (200, "")
    assert asked(house, {"Host": host, "Origin": "https://www.evil.com"})[0] == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/api/chat", "/v1/models", "/nothing"])
@pytest.mark.parametrize("headers", [{"Host": "evil.com"}, {"Origin": EVIL}, {"Sec-Fetch-Site": "cross-site"}])
def test_every_path_and_method_is_guarded(guarded: House, method: str, path: str, headers: dict[str, str]) -> None:
    response = guarded.send(path, b"", method, **headers)
    assert (response.status_code, response.content_type) == (403, "application/json")


def test_a_refusal_below_v1_has_openais_shape(guarded: House) -> None:
    error = guarded.send("/v1/models", b"", "GET", Origin=EVIL).get_json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "forbidden")


def test_a_refusal_comes_before_the_body_and_before_its_size(guarded: House) -> None:
    class Untouchable:
        def read(self, *_: int) -> bytes:
            raise AssertionError("the body was read")

    body = {"wsgi.input": Untouchable(), "CONTENT_LENGTH": str(1 << 40)}
    assert (
        asked(guarded, {"Host": "localhost", "Origin": EVIL}, "/api/chat", method="POST", environ_overrides=body)[0]
        == 403
    )


def test_a_page_of_another_port_is_told_what_to_set(guarded: House) -> None:
    page = {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}
    assert refused(guarded.send("/api/chat", b"", **page), 403) == (
        "A browser asks for a page of another site ('Sec-Fetch-Site' is 'same-site'): "
        "add 'http://localhost:3000' to RUSTLLAMA_ORIGINS at the server if that page may use it."
    )


@pytest.mark.parametrize("site", ["", "SAME-ORIGIN", "none, cross-site", "sideways"])
def test_a_site_that_no_browser_sends_is_another_one(guarded: House, site: str) -> None:
    assert asked(guarded, {"Host": "localhost", "Sec-Fetch-Site": site})[0] == 403


def test_a_star_allows_all_pages_but_those_without_an_origin(tmp_path: Path) -> None:
    house = build_house(tmp_path, origins=("*",))
    for page in ({"Origin": EVIL}, {}):
        assert asked(house, {"Host": "localhost", "Sec-Fetch-Site": "cross-site", **page}) == (200, "")
    assert house.send("/", b"", "GET", Origin=EVIL).headers["Access-Control-Allow-Origin"] == EVIL
    assert asked(house, {"Host": "localhost", "Origin": "null"})[0] == 403


def test_null_is_allowed_where_it_is_configured(tmp_path: Path) -> None:
    house = build_house(tmp_path, origins=("null",))
    page = {"Origin": "null", "Sec-Fetch-Site": "cross-site"}
    assert house.send("/", b"", "GET", **page).headers["Access-Control-Allow-Origin"] == "null"
    refused(house.send("/", b"", "GET", Origin=EVIL), 403)


def preflight(house: House, path: str = "/api/chat", **headers: str) -> dict[str, str]:
    """The headers of the answer, without our own id; it must be empty."""
    ask = {"Origin": APP, "Sec-Fetch-Site": "cross-site", "Access-Control-Request-Method": "POST", **headers}
    response = house.send(path, b"", "OPTIONS", **ask)
    assert (response.status_code, response.data) == (204, b"")
    return {name: value for name, value in response.headers.items() if name != "X-Request-Id"}


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
GRANTED = {
    "Access-Control-Allow-Methods": "DELETE, GET, HEAD, POST",
    "Access-Control-Max-Age": "7200",
    "Vary": "Origin",
    "Access-Control-Allow-Origin": APP,
    "Access-Control-Expose-Headers": "Retry-After, X-Request-Id",
}


@pytest.mark.parametrize("path", ["/", "/api/chat", "/api/delete", "/v1/models/some/model", "/metrics"])
def test_a_preflight_grants_what_a_page_of_ours_needs(house: House, path: str) -> None:
    granted = preflight(house, path, **{"Access-Control-Request-Headers": STAINLESS})
    assert granted == {**GRANTED, "Access-Control-Allow-Headers": STAINLESS}


@pytest.mark.parametrize("names", ["", "a b", "x: y", "a,,b", "ü", "a;b", "(x)", ","])
def test_header_names_that_are_none_are_not_echoed(house: House, names: str) -> None:
    assert preflight(house, **{"Access-Control-Request-Headers": names}) == GRANTED


def test_a_page_of_a_public_network_may_come_to_a_private_one(house: House) -> None:
    granted = preflight(house, **{"Access-Control-Request-Private-Network": "true"})
    assert granted == {**GRANTED, "Access-Control-Allow-Private-Network": "true"}


def test_a_preflight_of_what_is_not_there_is_a_404_that_the_page_can_read(house: House) -> None:
    response = house.send("/nothing", b"", "OPTIONS", Origin=APP, **{"Access-Control-Request-Method": "GET"})
    assert "There is nothing" in refused(response, 404)
    assert response.headers["Access-Control-Allow-Origin"] == APP


def test_options_without_the_question_of_a_preflight_tell_the_methods(house: House) -> None:
    response = house.send("/api/chat", b"", "OPTIONS", Origin=APP)
    assert (response.status_code, set(response.allow)) == (200, {"OPTIONS", "POST"})


@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost", "http://localhost:3000"])
@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
def test_nothing_is_granted_to_pages_that_are_not_configured(house: House, origin: str, method: str) -> None:
    asks = ["Access-Control-Request-Method", "Access-Control-Request-Private-Network"]
    response = house.send("/api/show", b"{}", method, Origin=origin, **dict.fromkeys(asks, "true"))
    assert [name for name, _ in response.headers if name.startswith("Access-Control")] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/list", b"", 200),
        ("POST", "/api/chat", b"{", 400),
        ("GET", "/nothing", b"", 404),
        ("PUT", "/api/chat", b"", 405),
        ("POST", "/api/chat", b" " * 5000, 413),
    ],
)
def test_a_page_of_ours_can_read_answers_and_errors(
    tmp_path: Path, method: str, path: str, body: bytes, status: int
) -> None:
    house = build_house(tmp_path, origins=(APP,), max_body=4096)
    response = house.send(path, body, method, Origin=APP)
    assert response.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == APP
    assert response.headers["Vary"] == "Origin"


def test_a_page_of_ours_can_read_our_own_faults_and_who_is_busy(house: House) -> None:
    house.script.load_error = InternalError("The model could not be loaded.")
    body = b'{"model": "toy", "messages": [{"role": "user", "content": "Hi"}]}'
    fault = house.send("/api/chat", body, Origin=APP)
    house.manager.draining = True
    draining = house.send("/api/chat", body, Origin=APP)
    for response, status in ((fault, 500), (draining, 503)):
        refused(response, status)
        assert response.headers["Access-Control-Allow-Origin"] == APP


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_a_page_of_ours_can_read_a_stream(house: House, path: str) -> None:
    body = b'{"model": "toy", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
    response = house.send(path, body, Origin=APP, **{"Sec-Fetch-Site": "cross-site"})
    assert response.headers["Access-Control-Allow-Origin"] == APP
    assert "Hello" in response.text


def test_without_configured_pages_nothing_varies(tmp_path: Path) -> None:
    assert "Vary" not in build_house(tmp_path).get("/").headers


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (
            "hosts",
            " Chat.example.com, 2001:DB8:0::1,[::2],10.0.0.1:80",
            ("chat.example.com", "2001:db8::1", "::2", "10.0.0.1"),
        ),
        ("hosts", "*", ("*",)),
        ("origins", f"{APP}, {EXTENSION},file://,null,*", (APP, EXTENSION, "file://", "null", "*")),
    ],
)
def test_the_settings_take(variable: str, value: str, expected: tuple[str, ...]) -> None:
    settings = Settings.from_env({f"RUSTLLAMA_{variable.upper()}": value})
    assert getattr(settings, variable) == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RUSTLLAMA_HOSTS", "https://chat.example.com"),
        ("RUSTLLAMA_HOSTS", "*.example.com"),
        ("RUSTLLAMA_ORIGINS", "chat.example.com"),
        ("RUSTLLAMA_ORIGINS", "https://chat.example.com/"),
        ("RUSTLLAMA_ORIGINS", "https://"),
        ("RUSTLLAMA_ORIGINS", "https://*.example.com"),
        ("RUSTLLAMA_ORIGINS", "http://localhost:*"),
    ],
)
def test_a_setting_that_would_never_match_stops_the_start(variable: str, value: str) -> None:
    with pytest.raises(SettingError, match=rf"^{variable}=.* like .*chat\.example\.com"):
        Settings.from_env({variable: value})


def test_programs_that_are_no_browsers_notice_nothing(server: Server) -> None:
    assert requests.get(f"{server.url}/api/list", timeout=60).ok
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 1}}
    assert requests.post(f"{server.url}/api/chat", json=chat, timeout=60).ok


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_a_server_refuses_what_names_no_host(server: Server, version: bytes) -> None:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname or "", where.port or 0)) as client:
        client.sendall(b"GET /api/list %b\r\nConnection: close\r\n\r\n" % version)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(version + b" 403 ")
    assert b"RUSTLLAMA_HOSTS" in answer


def test_a_server_refuses_the_page_that_a_browser_says_it_is(server: Server) -> None:
    response = requests.post(f"{server.url}/api/chat", data="x" * 100_000, headers={"Origin": EVIL}, timeout=60)
    assert (response.status_code, "RUSTLLAMA_ORIGINS" in response.text) == (403, True)
