"""OpenAI's dialect over fake engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from rustllama.errors import Busy, InternalError
from tests.fakes import House, build_house, events, fake_record, ok


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def test_a_completion_is_one_object(house: House) -> None:
    reply = ok(house.complete("Hi"))
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "toy"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there."}
    assert choice["finish_reason"] == "stop"
    assert "warnings" not in reply


def test_usage_counts_tokens_and_what_was_cached(house: House) -> None:
    usage = ok(house.complete("Hi"))["usage"]
    prompt = len(house.engines.request.prompt)
    assert usage == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(house: House) -> None:
    response = house.complete("Hi", stream=True)
    assert response.content_type == "text/event-stream"
    first, *pieces, last = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"] for piece in pieces] == [{"content": t} for t in ("Hello", " there", ".")]
    assert {piece["choices"][0]["finish_reason"] for piece in (first, *pieces)} == {None}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


def test_all_chunks_of_a_stream_share_id_time_and_object(house: House) -> None:
    chunks = events(house.complete("Hi", stream=True))
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert not any("usage" in chunk for chunk in chunks)


def test_include_usage_adds_a_chunk_without_choices(house: House) -> None:
    *others, last = events(house.complete("Hi", stream=True, stream_options={"include_usage": True}))
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert {chunk["usage"] for chunk in others} == {None}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "num_predict"])
def test_a_bound_on_tokens_has_three_names(house: House, field: str) -> None:
    reply = ok(house.complete("Hi", **{field: 1}))
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 1)


@pytest.mark.parametrize(("stop", "used"), [("x", ("x",)), (["x", "y"], ("x", "y")), (None, ()), ("", ())])
def test_stop_is_a_string_or_a_list(house: House, stop: object, used: tuple[str, ...]) -> None:
    house.complete("Hi", stop=stop)
    assert house.engines.request.stop == used


def test_sampling_and_our_own_options_are_taken_from_the_body(house: House) -> None:
    house.complete("Hi", seed=3, top_p=0.5, presence_penalty=1, frequency_penalty=-1, top_k=7, num_ctx=128)
    request = house.engines.request
    sampling = request.sampling
    assert (sampling.seed, sampling.top_p, sampling.top_k) == (3, 0.5, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty, request.num_ctx) == (1, -1, 128)


def test_keep_alive_is_taken_from_the_body(house: House) -> None:
    house.complete("Hi", keep_alive=0)
    assert house.engines.last.closed


def test_a_developer_speaks_as_the_system(house: House) -> None:
    house.complete(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert house.engines.last.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_prompt_beyond_the_context_is_refused_with_openais_code(house: House) -> None:
    response = house.complete("old " * 60, "yes", "Hi", num_ctx=32)
    assert response.status_code == 400
    error = response.get_json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
    assert "32 tokens" in error["message"]


def test_an_unknown_model_is_a_404_in_openais_shape(house: House) -> None:
    response = house.complete("Hi", model="x")
    error = response.get_json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", None)
    assert error["message"].startswith("model 'x' not found")


def test_a_full_queue_tells_when_to_try_again(house: House) -> None:
    house.script.refusal = Busy("server busy, please try again. maximum pending requests exceeded")
    response = house.complete("Hi")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert response.get_json()["error"]["type"] == "server_error"


def test_an_error_in_mid_stream_is_an_event_before_done(house: House) -> None:
    house.script.breaks_at, house.script.error = 1, InternalError("The engine failed.")
    *_, piece, last = events(house.complete("Hi", stream=True))
    assert piece["choices"][0]["delta"] == {"content": "Hello"}
    assert last["error"]["message"].startswith("The engine failed.")
    assert last["error"]["code"] == "internal_error"


def test_warnings_are_told_where_there_are_any(house: House, tmp_path: Path) -> None:
    house.registry.put(fake_record(tmp_path / "bare.gguf", "bare", chat_template=None))
    assert "ChatML" in ok(house.complete("Hi", model="bare"))["warnings"][0]
    assert "ChatML" in events(house.complete("Hi", model="bare", stream=True))[-1]["warnings"][0]
