"""The official clients, unmodified, and the user's own curl commands, against a real server with the bundled model."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import ollama
import openai
import pytest
import requests

from tests.conftest import Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "num_predict": 16}


@pytest.fixture
def ollama_client(server: Server) -> Iterator[ollama.Client]:
    with closing(ollama.Client(host=server.url)) as client:
        yield client


@pytest.fixture
def openai_client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def curl(*arguments: str) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("there is no curl")
    return subprocess.run([program, "-sS", *arguments], capture_output=True, text=True, check=True).stdout


def test_ollama_chats(ollama_client: ollama.Client) -> None:
    reply = ollama_client.chat("demo", QUESTION, options=GREEDY)
    assert reply.message.role == "assistant"
    assert reply.message.content
    assert reply.done_reason in ("stop", "length")
    assert reply.prompt_eval_count
    assert reply.eval_count


def test_ollama_streams_the_same_text_as_it_answers_at_once(ollama_client: ollama.Client) -> None:
    parts = list(ollama_client.chat("demo", QUESTION, options=GREEDY, stream=True))
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    whole = ollama_client.chat("demo", QUESTION, options=GREEDY)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content


def test_ollama_streams_without_blocking_an_event_loop(server: Server) -> None:
    async def ask() -> list[bool | None]:
        client = ollama.AsyncClient(host=server.url)
        try:
            return [part.done async for part in await client.chat("demo", QUESTION, options=GREEDY, stream=True)]
        finally:
            await client.close()  # type: ignore[no-untyped-call]

    assert asyncio.run(ask())[-1] is True


def test_ollama_generates(ollama_client: ollama.Client) -> None:
    reply = ollama_client.generate("demo", "What is the capital of France?", options=GREEDY)
    assert reply.response == ollama_client.chat("demo", QUESTION, options=GREEDY).message.content
    *_, last = ollama_client.generate("demo", "Hello", options=GREEDY, stream=True)
    assert (last.done, last.response) == (True, "")


def test_ollama_lists_shows_and_sees_what_is_loaded(ollama_client: ollama.Client) -> None:
    ollama_client.chat("demo", QUESTION, options=GREEDY)
    assert [model.model for model in ollama_client.list().models] == ["demo:latest"]
    shown = ollama_client.show("demo")
    assert shown.details is not None
    assert shown.details.format == "gguf"
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == shown.details.family
    assert [model.name for model in ollama_client.ps().models] == ["demo:latest"]


def test_ollama_sends_a_file_and_makes_a_model_of_it(
    server: Server, ollama_client: ollama.Client, toys: dict[str, Path]
) -> None:
    digest = ollama_client.create_blob(toys["llama"])
    assert ollama_client.create_blob(toys["llama"]) == digest
    made = ollama_client.create("sent", files={"llama.gguf": digest}, system="Be brief.", parameters={"top_k": 3})
    assert made.status == "success"
    told = [part.status for part in ollama_client.create("again", from_="sent", stream=True)]
    assert told[-1] == "success"
    assert ollama_client.chat("again", QUESTION, options={"num_predict": 3}).eval_count == 3
    kept = server.home / "models" / "blobs" / digest.replace(":", "-")
    for name in ("sent", "again"):
        assert kept.exists()
        ollama_client.delete(name)
    assert not kept.exists()


def test_ollama_sends_a_file_in_chunks(server: Server, toys: dict[str, Path]) -> None:
    async def send() -> str:
        client = ollama.AsyncClient(host=server.url)
        try:
            digest = await client.create_blob(toys["mamba"])
            await client.create("sent", files={"mamba.gguf": digest})
            await client.delete("sent")
            return digest
        finally:
            await client.close()  # type: ignore[no-untyped-call]

    assert asyncio.run(send()).startswith("sha256:")


def test_ollama_hears_what_a_create_cannot_honour(ollama_client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="'adapters' is not supported"):
        ollama_client.create("x", from_="demo", adapters={"a": "b"})


def test_ollama_gets_errors_with_their_status(ollama_client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'x' not found") as missing:
        ollama_client.chat("x", QUESTION)
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"'options\.top_p' must be a number from 0 to 1") as wrong:
        list(ollama_client.chat("demo", QUESTION, options={"top_p": 7}, stream=True))
    assert wrong.value.status_code == 400


def test_ollama_gets_lines_of_progress_and_is_none_the_worse(ollama_client: ollama.Client) -> None:
    body = {"model": "demo", "options": GREEDY, "stream": True, "progress": True}
    ask = ollama_client._request  # its methods take no fields but their own
    chat = {**body, "messages": QUESTION}
    parts = list(ask(ollama.ChatResponse, "POST", "/api/chat", json=chat, stream=True))
    assert len(parts) > len(list(ollama_client.chat("demo", QUESTION, options=GREEDY, stream=True)))
    assert "".join(part.message.content or "" for part in parts) == (
        ollama_client.chat("demo", QUESTION, options=GREEDY).message.content
    )
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    generate = {**body, "prompt": "Hello"}
    *_, last = ask(ollama.GenerateResponse, "POST", "/api/generate", json=generate, stream=True)
    assert (last.done, last.response) == (True, "")


def test_openai_completes(openai_client: openai.OpenAI) -> None:
    reply = openai_client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=16
    )
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_openai_streams_with_usage(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=16,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_gets_progress_in_chunks_that_say_nothing(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            max_tokens=4,
            extra_body={"progress": True},
        )
    )
    told = [chunk.model_extra["progress"] for chunk in chunks if chunk.model_extra]
    assert told[-1]["status"] == "prompt"
    assert told[-1]["completed"] == told[-1]["total"] > 0
    assert all(chunk.choices[0].delta.content is None for chunk in chunks if chunk.model_extra)


def test_openai_lists_and_retrieves_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["demo"]
    assert openai_client.models.retrieve("demo").object == "model"


def test_openai_gets_its_own_exceptions(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'x' not found"):
        openai_client.chat.completions.create(model="x", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "word " * 99_999}])
    assert refused.value.code == "context_length_exceeded"


def test_the_users_own_commands_work_as_they_stand(server: Server) -> None:
    models = json.loads(curl(f"{server.url}/api/list"))["models"]
    assert [model["format"] for model in models] == ["gguf"]
    body = '{"model":"demo", "messages":[{"role":"user", "content":"why is the sky blue?"}]}'
    assert json.loads(curl(f"{server.url}/api/chat", "-d", body))["message"]["role"] == "assistant"


def test_the_users_create_and_delete_work_as_they_stand(server: Server, toys: dict[str, Path]) -> None:
    body = json.dumps({"name": "modelname", "modelpath": str(toys["llama"])})
    assert curl(f"{server.url}/api/create", "-d", body) == '{"status":"success"}\n'
    assert "modelname" in curl(f"{server.url}/api/list")
    assert curl("-X", "DELETE", f"{server.url}/api/delete", "-d", '{"name":"modelname"}') == '{"status":"success"}\n'
    assert curl("-X", "DELETE", f"{server.url}/api/delete", "-d", '{"name":"modelname"}').startswith(
        '{"error":"model \'modelname\' not found'
    )


def test_a_large_chunked_body_is_a_json_413(server: Server) -> None:
    body = (b" " * 1024**2 for _ in range(21))
    response = requests.post(f"{server.url}/api/chat", data=body, timeout=60)
    assert response.status_code == 413
    assert "RUSTLLAMA_MAX_BODY" in response.json()["error"]


def test_clients_that_leave_in_mid_stream_leave_nothing_running(server: Server) -> None:
    body = {"model": "demo", "messages": QUESTION, "stream": True, "options": {"num_predict": 4000}}
    for _ in range(10):
        with requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=60) as response:
            assert next(response.iter_lines())
    states = (requests.get(f"{server.url}/api/ps", timeout=60).json()["models"] for _ in range(1000))
    assert any(all(model["running"] == 0 for model in models) for models in states)
