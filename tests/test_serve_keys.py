"""Keys, the bind rule and TLS of a real server: how it starts, who gets in, and the clients with a key."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import gevent
import gevent.socket
import ollama
import openai
import pytest
import requests
from gevent.ssl import SSLContext

from rustllama.client import Client
from rustllama.errors import Forbidden, RustllamaError, Unauthorized
from rustllama.replies import Message
from rustllama.tls import shake_hands
from tests.conftest import Certificate, Server, start_server
from tests.test_serve import serve_fails, until

WAIT_S = 30
HELLO = [{"role": "user", "content": "hello"}]
OTHERS = "127.1:0"  # an address that is not known to be loopback before it is bound


def rustllama(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rustllama", *arguments]
    variables = {**os.environ, "RUSTLLAMA_HOME": str(home), **environ}
    return subprocess.run(command, env=variables, input="", capture_output=True, text=True, timeout=60)


def add_key(home: Path, name: str, *options: str) -> str:
    return rustllama(home, "key", "add", name, *options).stdout.strip()


@dataclass(frozen=True, slots=True)
class Keyed:
    server: Server
    secret: str


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with a key. One that it binds beyond loopback, for all that it knows."""
    home = tmp_path_factory.mktemp("home")
    secret = add_key(home, "me")
    server = start_server(home, environ={"RUSTLLAMA_HOST": OTHERS})
    yield Keyed(server, secret)
    assert server.stop() == 0


def status_of(server: Server, secret: str, path: str = "/api/list") -> int:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return requests.get(server.url + path, headers=headers, timeout=WAIT_S).status_code


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]", "127.1", "192.0.2.1", "some.name"])
def test_an_address_beyond_loopback_needs_a_key_and_says_what_to_do(tmp_path: Path, address: str) -> None:
    line = serve_fails(RUSTLLAMA_HOST=f"{address}:0", RUSTLLAMA_HOME=str(tmp_path))
    assert f"RUSTLLAMA_HOST={address.strip('[]')} " in line
    assert all(
        way in line for way in ("`rustllama key add NAME`", "--insecure-no-auth", "RUSTLLAMA_INSECURE_NO_AUTH=1")
    )


def test_a_server_that_wants_a_key_does_not_start_without_one(tmp_path: Path) -> None:
    environ = {"RUSTLLAMA_HOST": "127.0.0.1:0", "RUSTLLAMA_HOME": str(tmp_path)}
    assert "`rustllama key add NAME`" in serve_fails("--require-key", **environ)
    assert "`rustllama key add NAME`" in serve_fails(RUSTLLAMA_REQUIRE_KEY="1", **environ)


def test_without_a_key_only_the_insecure_way_leads_beyond_loopback(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home", "--insecure-no-auth", environ={"RUSTLLAMA_HOST": OTHERS})
    assert status_of(server, "") == 200
    assert server.stop() == 0


def test_with_a_key_others_get_in_by_it_alone(keyed: Keyed) -> None:
    assert [status_of(keyed.server, secret) for secret in (keyed.secret, "", "rl_x")] == [200, 401, 401]
    assert status_of(keyed.server, "", "/health") == 200


def test_a_key_counts_from_when_it_is_made_until_it_is_removed(keyed: Keyed) -> None:
    secret = add_key(keyed.server.home, "guest", "--chat-only")
    until(lambda: status_of(keyed.server, secret) == 200)
    assert rustllama(keyed.server.home, "key", "rm", "guest").returncode == 0
    until(lambda: status_of(keyed.server, secret) == 401)
    assert status_of(keyed.server, keyed.secret) == 200


def test_openais_client_brings_its_key(keyed: Keyed) -> None:
    url = f"{keyed.server.url}/v1"
    with openai.OpenAI(base_url=url, api_key=keyed.secret) as client:
        assert client.chat.completions.create(model="demo", messages=HELLO, max_tokens=3).choices  # type: ignore[arg-type]
    with openai.OpenAI(base_url=url, api_key="none") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_ollamas_client_brings_its_key(keyed: Keyed) -> None:
    headers = {"Authorization": f"Bearer {keyed.secret}"}
    with closing(ollama.Client(host=keyed.server.url, headers=headers)) as client:
        *_, last = client.chat("demo", HELLO, stream=True, options={"num_predict": 3})
        assert last.done
    with (
        closing(ollama.Client(host=keyed.server.url)) as stranger,
        pytest.raises(ollama.ResponseError, match="API key"),
    ):
        stranger.list()


def test_the_verbs_bring_the_key_of_the_environment(keyed: Keyed, tmp_path: Path) -> None:
    environ = {"RUSTLLAMA_HOST": keyed.server.url, "RUSTLLAMA_API_KEY": f"{keyed.secret}\n"}
    assert "demo" in rustllama(tmp_path, "list", **environ).stdout
    assert rustllama(tmp_path, "run", "demo", "hello", **environ).stdout.strip()
    bench = ("bench", "-n", "1", "--prompt-tokens", "30", "--answer-tokens", "2", "--json")
    assert rustllama(tmp_path, *bench, **environ).returncode == 0


@pytest.mark.parametrize("arguments", [("list",), ("run", "demo", "hello")])
@pytest.mark.parametrize(("secret", "words"), [("", "wants an API key: set"), ("rl_x", "does not take the API key in")])
def test_without_the_key_one_line_says_where_to_put_it(
    keyed: Keyed, tmp_path: Path, arguments: tuple[str, ...], secret: str, words: str
) -> None:
    environ = {"RUSTLLAMA_HOST": keyed.server.url, "RUSTLLAMA_API_KEY": secret}
    done = rustllama(tmp_path, *arguments, **environ)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{words} RUSTLLAMA_API_KEY" in done.stderr


def test_a_key_goes_with_a_password_file_too(keyed: Keyed, tmp_path: Path) -> None:
    """requests would send what ~/.netrc has in its place, beyond loopback."""
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    environ = {"RUSTLLAMA_HOST": keyed.server.url, "RUSTLLAMA_API_KEY": keyed.secret, "HOME": str(tmp_path)}
    assert rustllama(tmp_path, "list", **environ).returncode == 0


def test_what_a_key_may_not_do_is_told_in_the_servers_words(keyed: Keyed) -> None:
    client = Client(keyed.server.url, api_key=add_key(keyed.server.home, "chatter", "--chat-only"))
    until(lambda: status_of(keyed.server, client.api_key) == 200)
    with pytest.raises(Forbidden, match="The API key 'chatter' may chat"):
        client.delete("demo")
    with pytest.raises(Unauthorized):
        Client(keyed.server.url).version()


def test_the_private_server_is_the_consoles_alone_whatever_the_settings_are(tmp_path: Path) -> None:
    add_key(tmp_path, "me")
    environ = {"RUSTLLAMA_REQUIRE_KEY": "1", "RUSTLLAMA_TLS_CERT": "/nowhere", "RUSTLLAMA_HOST": "127.0.0.1:9"}
    done = rustllama(tmp_path, "run", "demo", "hello", **environ)
    assert (done.returncode, done.stdout.strip() != "") == (0, True)
    assert "key=console" in (tmp_path / "private-server.log").read_text()


@pytest.fixture(scope="module")
def secure(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("home"), environ=certificate.environ)
    yield server
    assert server.stop() == 0


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("https://").split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def test_a_server_with_a_certificate_says_https_and_speaks_it(secure: Server, certificate: Certificate) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    client = Client(secure.url, ca=str(certificate.cert))
    *_, last = client.chat("demo", [Message("user", "hello")], {"num_predict": 3})
    assert last.done
    environ = {"RUSTLLAMA_HOST": secure.url, "RUSTLLAMA_CA": str(certificate.cert)}
    assert "demo" in rustllama(secure.home, "list", **environ).stdout


def test_a_certificate_that_nobody_vouches_for_is_not_trusted(secure: Server) -> None:
    with pytest.raises(RustllamaError, match="certificate verify failed"):
        Client(secure.url).models()


def test_who_speaks_plain_http_is_told_to_use_https(secure: Server) -> None:
    answer = requests.get(secure.url.replace("https", "http") + "/api/list", timeout=WAIT_S)
    assert (answer.status_code, "https://" in answer.json()["error"]) == (400, True)


def test_strangers_who_do_not_shake_hands_stop_nobody_and_leave_no_traceback(
    secure: Server, certificate: Certificate
) -> None:
    with ExitStack() as strangers:
        for first in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01nonsense" * 50, b"hello\r\n\r\n", b"\x00" * 9):
            stranger = strangers.enter_context(connect(secure))
            stranger.sendall(first)
        with pytest.raises(ssl.SSLError), connect(secure) as raw:
            ssl.create_default_context().wrap_socket(raw, server_hostname="127.0.0.1")
        assert Client(secure.url, ca=str(certificate.cert)).models()
    until(lambda: sum(map(int, re.findall(r" refused (\d+) ", secure.log.read_text()))) >= 4)
    assert "Traceback" not in secure.log.read_text()


def test_a_connection_that_turns_to_nonsense_is_a_line_in_the_log(secure: Server, certificate: Certificate) -> None:
    context = ssl.create_default_context(cafile=certificate.cert)
    with connect(secure) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as shaken:
        with socket.socket(fileno=os.dup(shaken.fileno())) as below:
            below.sendall(b"GET / HTTP/1.1\r\n\r\n")
        until(lambda: "a connection broke" in secure.log.read_text())
    assert "Traceback" not in secure.log.read_text()


@pytest.mark.parametrize("said", [b"", b"\x16"])
def test_who_never_ends_the_handshake_is_cut_off(said: bytes) -> None:
    ours, theirs = gevent.socket.socketpair()
    theirs.sendall(said)
    reasons: list[str] = []
    shaking = gevent.spawn(shake_hands, ours, SSLContext(ssl.PROTOCOL_TLS_SERVER), reasons.append, 0.01)
    assert shaking.get(timeout=WAIT_S) is None
    assert reasons == ["Timeout"]
    with contextlib.suppress(ConnectionResetError):  # what was not read
        assert theirs.recv(1) == b""
    theirs.close()


def test_a_client_that_leaves_in_the_middle_over_tls_ends_its_answer(
    certificate: Certificate, tmp_path: Path, toys: dict[str, Path]
) -> None:
    server = start_server(tmp_path / "home", environ=certificate.environ)
    client = Client(server.url, ca=str(certificate.cert))
    client.create("toy", str(toys["llama"]))
    replies = client.chat("toy", [Message("user", "hello")], {"num_predict": 100_000, "num_ctx": 512})
    next(reply for reply in replies if not reply.status)
    replies.close()
    until(lambda: not client.loaded()[0].running)
    assert server.stop() == 0


def test_over_tls_a_connection_too_many_is_closed_without_a_word(certificate: Certificate, tmp_path: Path) -> None:
    server = start_server(tmp_path / "home", environ={**certificate.environ, "RUSTLLAMA_MAX_CONNECTIONS": "1"})

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(server.url + "/health", verify=str(certificate.cert), timeout=WAIT_S).ok
        return False

    with connect(server), connect(server) as surplus:
        assert surplus.recv(1) == b""
        assert not answers()
    until(answers)
    until(lambda: "Busy (" in server.log.read_text())
    assert server.stop() == 0


@pytest.mark.parametrize("damage", ["no cert", "no key", "key alone", "swapped", "garbage"])
def test_files_that_are_no_certificate_and_key_stop_the_start_with_one_line(
    certificate: Certificate, tmp_path: Path, damage: str
) -> None:
    cert, key, nowhere, garbage = certificate.cert, certificate.key, tmp_path / "nowhere", tmp_path / "garbage"
    garbage.write_text("hello")
    pair = {
        "no cert": (nowhere, key),
        "no key": (cert, nowhere),
        "key alone": ("", key),
        "swapped": (key, cert),
        "garbage": (garbage, key),
    }[damage]
    variables = {"RUSTLLAMA_TLS_CERT": str(pair[0]), "RUSTLLAMA_TLS_KEY": str(pair[1])}
    line = serve_fails(RUSTLLAMA_HOST="127.0.0.1:0", RUSTLLAMA_HOME=str(tmp_path), **variables)
    assert "RUSTLLAMA_TLS_" in line


def test_a_ca_that_is_no_file_is_named(tmp_path: Path) -> None:
    done = rustllama(tmp_path, "list", RUSTLLAMA_CA=str(tmp_path / "nowhere"))
    assert (done.returncode, "RUSTLLAMA_CA=" in done.stderr) == (2, True)


def test_a_key_with_strange_characters_is_named_and_not_shown(tmp_path: Path) -> None:
    done = rustllama(tmp_path, "list", RUSTLLAMA_API_KEY="rl_ä")
    assert (done.returncode, "RUSTLLAMA_API_KEY" in done.stderr, "rl_" in done.stderr) == (2, True, False)
