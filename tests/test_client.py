"""The HTTP client: addresses, errors in words, streams that end well or say that they did not."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rustllama.client import Client, base_url
from rustllama.errors import RustllamaError, ServerUnreachable, SettingError
from rustllama.origin import is_loopback
from rustllama.replies import Message
from tests.stand_in import BREAK, HANG, StandIn, last_line, line, model, stand_in, status_line

HELLO = [Message("user", "hello")]
WAIT_S = 20.0


@pytest.fixture
def fake() -> Iterator[StandIn]:
    with stand_in() as found:
        yield found


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost", "http://localhost:11435"),
        (":8080", "http://localhost:8080"),
        ("10.0.0.5", "http://10.0.0.5:11435"),
        ("gpu.lan:1234", "http://gpu.lan:1234"),
        ("http://gpu.lan", "http://gpu.lan:80"),
        ("https://gpu.lan/", "https://gpu.lan:443"),
        ("https://gpu.lan/llama/", "https://gpu.lan:443/llama"),
        ("gpu.lan:1234/llama", "http://gpu.lan:1234/llama"),
        ("0.0.0.0", "http://127.0.0.1:11435"),
        ("http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("::", "http://[::1]:11435"),
        ("[::]:99", "http://[::1]:99"),
        ("::1", "http://[::1]:11435"),
        ("127.0.0.1:0", "http://127.0.0.1:11435"),
    ],
)
def test_every_usual_form_of_an_address_is_understood(address: str, url: str) -> None:
    assert base_url(address) == url


@pytest.mark.parametrize("address", ["ftp://gpu.lan", "gpu.lan:http", "gpu.lan:99999"])
def test_a_bad_address_is_a_setting_error_that_shows_it(address: str) -> None:
    with pytest.raises(SettingError, match=f"RUSTLLAMA_HOST='{address}'"):
        Client(address)


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_never_goes_through_a_proxy(host: str) -> None:
    assert is_loopback(host)


def test_a_proxy_of_the_environment_is_ignored_on_loopback(fake: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Client(fake.url).version().rustllama == "0.1.0"


def test_a_proxy_of_the_environment_serves_other_machines(fake: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", fake.url)
    monkeypatch.delenv("no_proxy", raising=False)
    fake.answers["GET http://gpu.invalid:1/api/list"] = b'{"models":[]}'
    assert Client("gpu.invalid:1").models() == []


def test_a_path_prefix_is_kept(fake: StandIn) -> None:
    fake.answers["GET /llama/api/list"] = b'{"models":[]}'
    assert Client(f"{fake.url}/llama").models() == []


def test_no_server_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerUnreachable, match="start one with `rustllama serve`"):
        Client(address).models()


def test_a_refusal_is_the_servers_own_sentence(fake: StandIn) -> None:
    fake.answers["DELETE /api/delete"] = (404, b'{"error":"model \'x\' not found"}')
    with pytest.raises(RustllamaError, match=r"^model 'x' not found$"):
        Client(fake.url).delete("x")


def test_a_create_that_fails_says_why(fake: StandIn) -> None:
    fake.answers["POST /api/create"] = (400, b'{"status":"failed to create model","error":"no such file"}')
    with pytest.raises(RustllamaError, match=r"^no such file$"):
        Client(fake.url).create("x", "/y.gguf")
    assert fake.bodies("POST /api/create") == [{"name": "x", "modelpath": "/y.gguf"}]


@pytest.mark.parametrize("answer", [(200, b'{"version":"0.6.4"}'), (404, b"<html>"), (200, b"Ollama is running")])
def test_a_stranger_at_the_address_is_recognized(fake: StandIn, answer: tuple[int, bytes]) -> None:
    fake.answers["GET /api/version"] = answer
    with pytest.raises(RustllamaError, match="no rustllama server"):
        Client(fake.url).version()


def test_an_error_without_json_names_the_status(fake: StandIn) -> None:
    fake.answers["GET /api/list"] = (502, b"<html>Bad Gateway</html>")
    with pytest.raises(RustllamaError, match="status 502"):
        Client(fake.url).models()


def test_models_have_size_and_details(fake: StandIn) -> None:
    fake.models(model("a", "/models/a.gguf"))
    (found,) = Client(fake.url).models()
    assert (found.name, found.path, found.size, found.details.quantization_level) == (
        "a",
        "/models/a.gguf",
        1_300_000_000,
        "Q8_0",
    )


def test_a_list_may_have_warnings(fake: StandIn) -> None:
    assert Client(fake.url).listing().warnings == []
    fake.answers["GET /api/list"] = b'{"models":[],"warnings":["The registry was damaged."]}'
    assert Client(fake.url).listing().warnings == ["The registry was damaged."]


def test_an_unload_is_a_chat_without_messages_that_keeps_nothing_alive(fake: StandIn) -> None:
    Client(fake.url).unload("demo")
    assert fake.bodies("POST /api/chat") == [{"model": "demo", "messages": [], "keep_alive": 0, "forget": False}]


def test_lines_are_whole_however_they_were_cut(fake: StandIn) -> None:
    text = line("häl") + line("lo") + last_line(eval_count=2)
    fake.says(*(text[at : at + 7] for at in range(0, len(text), 7)))
    replies = list(Client(fake.url).chat("demo", HELLO))
    assert "".join(reply.message.content for reply in replies) == "hällo"
    assert (replies[-1].done, replies[-1].eval_count) == (True, 2)


def test_what_comes_before_the_first_word_is_asked_for_and_read(fake: StandIn) -> None:
    fake.says(status_line("queued", position=2), status_line("prompt", completed=2, total=9, cached=1), last_line())
    queued, prompt, _ = Client(fake.url).chat("demo", HELLO)
    assert fake.bodies("POST /api/chat")[0]["progress"] is True
    assert (queued.status, queued.position, queued.model) == ("queued", 2, "demo")
    assert (prompt.status, prompt.completed, prompt.total, prompt.cached) == ("prompt", 2, 9, 1)


def test_a_load_is_a_chat_without_messages(fake: StandIn) -> None:
    *_, last = Client(fake.url).load("demo", {"num_ctx": 64})
    assert last.done
    (body,) = fake.bodies("POST /api/chat")
    assert (body["messages"], body["options"]) == ([], {"num_ctx": 64})


@pytest.mark.parametrize("end", [(BREAK,), (), (b'{"message":',)])
def test_a_stream_that_breaks_off_is_an_error(fake: StandIn, end: tuple[bytes, ...]) -> None:
    fake.says(line("Hel"), *end)
    replies = Client(fake.url).chat("demo", HELLO)
    assert next(replies).message.content == "Hel"
    with pytest.raises(RustllamaError, match="broke before the answer was complete"):
        next(replies)


def test_an_error_line_in_mid_stream_is_raised(fake: StandIn) -> None:
    fake.says(line("Hel"), b'{"error":"the server is leaving"}\n')
    with pytest.raises(RustllamaError, match=r"^the server is leaving$"):
        list(Client(fake.url).chat("demo", HELLO))


def test_closing_a_chat_hangs_up(fake: StandIn) -> None:
    fake.says(line("Hel"), HANG)
    replies = Client(fake.url).chat("demo", HELLO)
    next(replies)
    replies.close()
    assert fake.hung_up.wait(WAIT_S)


def test_text_that_is_not_unicode_is_refused_before_it_is_sent(fake: StandIn) -> None:
    with pytest.raises(RustllamaError, match="not valid UTF-8"):
        next(Client(fake.url).chat("demo", [Message("user", "\udcff")]))
    assert fake.seen == []
