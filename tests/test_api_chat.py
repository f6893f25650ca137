"""`/api/chat` and `/api/generate`: what is sent comes out at the engine, and what it answers comes back."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from rustllama.core import LoadOptions, SamplingParams
from tests.fakes import House, build_house, fake_record, lines, ok, refused

STATISTICS = {
    "total_duration",
    "load_duration",
    "queue_duration",
    "prompt_eval_count",
    "prompt_eval_cached_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def test_an_answer_is_one_object_unless_streaming_is_asked_for(house: House) -> None:
    response = house.chat("Hi")
    assert response.content_type == "application/json"
    assert response.data.endswith(b"}\n")
    assert ok(response)["message"] == {"role": "assistant", "content": "Hello there."}


def test_the_statistics_come_with_the_answer(house: House) -> None:
    reply = ok(house.chat("Hi"))
    assert reply.keys() >= STATISTICS
    assert (reply["done"], reply["done_reason"], reply["warnings"]) == (True, "stop", [])
    assert (reply["eval_count"], reply["prompt_eval_count"]) == (3, len(house.engines.request.prompt))
    assert (reply["queue_duration"], reply["prompt_eval_duration"], reply["eval_duration"]) == (3_000, 4_000, 5_000)


def test_the_first_answer_tells_how_long_the_load_took_and_the_next_that_it_took_nothing(house: House) -> None:
    first, second = ok(house.chat("Hi")), ok(house.chat("Hi"))
    assert first["load_duration"] > 0 == second["load_duration"]


def test_a_stream_has_a_line_for_each_piece_and_statistics_in_the_last(house: House) -> None:
    response = house.chat("Hi", stream=True)
    *pieces, last = lines(response)
    assert response.content_type == "application/x-ndjson"
    assert [piece["message"] for piece in pieces] == [
        {"role": "assistant", "content": text} for text in ("Hello", " there", ".")
    ]
    assert {piece["done"] for piece in pieces} == {False}
    assert last.keys() >= STATISTICS
    assert last["message"] == {"role": "assistant", "content": ""}


def test_every_line_names_the_model_as_it_was_given_and_the_time(house: House) -> None:
    for line in lines(house.chat("Hi", model=" TOY:latest ", stream=True)):
        assert line["model"] == "TOY:latest"
        assert datetime.fromisoformat(line["created_at"].replace("Z", "+00:00")).tzinfo is not None


def test_a_stream_tells_proxies_not_to_hold_it_back(house: House) -> None:
    assert house.chat("Hi", stream=True).headers["X-Accel-Buffering"] == "no"


def test_quotes_and_other_scripts_pass_unharmed(house: House) -> None:
    house.script.pieces = ('"\n\\', "ü", "世界", "🦙")
    assert "".join(line["message"]["content"] for line in lines(house.chat("Hi", stream=True))) == '"\n\\ü世界🦙'


def test_the_prompt_is_rendered_with_the_models_own_template(house: House) -> None:
    house.chat("Hi", "Yes?", "Why?")
    assert house.engines.last.text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_of_a_message_is_never_trusted_as_a_special_token(house: House) -> None:
    house.chat("<|im_end|>")
    assert [span.trusted for span in house.engines.last.prompts[-1] if "<|im_end|>" in span.text][:1] == [False]


@pytest.mark.parametrize("alias", ["name", "model"])
def test_name_is_an_alias_of_model(house: House, alias: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], alias: "toy"}
    assert house.post("/api/chat", **body).status_code == 200


def test_an_assistant_message_without_content_is_an_empty_one(house: House) -> None:
    messages = [{"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "user", "content": "Hi"}]
    assert house.chat(messages=messages).status_code == 200


def test_content_may_come_as_parts_of_text(house: House) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    house.chat(messages=[{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in house.engines.last.text


def test_a_tool_message_goes_to_the_template(house: House) -> None:
    house.chat(messages=[{"role": "user", "content": "Hi"}, {"role": "tool", "content": "42"}])
    assert "<|im_start|>tool\n42<|im_end|>" in house.engines.last.text


def test_without_options_the_sampler_has_ollamas_defaults(house: House) -> None:
    house.chat("Hi")
    assert house.engines.request.sampling == SamplingParams()
    assert house.engines.request.max_tokens is None
    assert house.engines.options == [LoadOptions()]


def test_options_reach_the_sampler(house: House) -> None:
    house.chat("Hi", options={"temperature": 0, "top_k": 3.0, "seed": 7, "num_predict": 2, "stop": ["x", ""]})
    request = house.engines.request
    assert request.sampling == SamplingParams(temperature=0, top_k=3, seed=7)
    assert (request.max_tokens, request.stop) == (2, ("x",))


def recommend(house: House, **sampling: float) -> None:
    """Gives the model's file these `general.sampling` keys."""
    record = house.registry.get("toy")
    keys = {f"general.sampling.{name}": value for name, value in sampling.items()}
    house.registry.put(replace(record, info=replace(record.info, metadata={**record.info.metadata, **keys})))


def test_what_the_file_recommends_comes_between_the_request_and_the_defaults(house: House) -> None:
    recommend(house, temp=0.25, top_k=7, penalty_repeat=1.5)
    house.chat("Hi", options={"top_k": 3})
    assert house.engines.request.sampling == SamplingParams(temperature=0.25, top_k=3, repeat_penalty=1.5)
    assert "temperature                    0.25\n" in ok(house.post("/api/show", model="toy"))["parameters"]


def test_a_recommendation_out_of_range_is_left_alone(house: House) -> None:
    recommend(house, temp=-5.0)
    house.chat("Hi")
    assert house.engines.request.sampling == SamplingParams()


def test_a_bound_on_tokens_ends_the_answer_by_length(house: House) -> None:
    reply = ok(house.chat("Hi", options={"num_predict": 2}))
    assert (reply["done_reason"], reply["message"]["content"]) == ("length", "Hello there")


@pytest.mark.parametrize("unbounded", [-1, -2, 0])
def test_num_predict_below_one_leaves_the_bound_to_the_context(house: House, unbounded: int) -> None:
    house.chat("Hi", options={"num_predict": unbounded})
    assert house.engines.request.max_tokens is None


@pytest.mark.parametrize(
    ("options", "by_default", "seed", "reproducible"),
    [
        ({}, False, -1, False),
        ({"reproducible": True}, False, 0, True),
        ({"reproducible": True, "seed": 5}, False, 5, True),
        ({}, True, 0, True),
        ({"reproducible": False}, True, -1, False),
    ],
)
def test_a_request_or_a_setting_asks_for_the_same_bits(
    tmp_path: Path, options: dict[str, object], by_default: bool, seed: int, reproducible: bool
) -> None:
    house = build_house(tmp_path, reproducible=by_default)
    ok(house.chat("Hi", options=options))
    request = house.engines.request
    assert (request.reproducible, request.sampling.seed) == (reproducible, seed)
    assert house.engines.last.as_written is not reproducible, "what was written before must not matter"


@pytest.mark.parametrize(("given", "used"), [(-5, -1), (2**63 - 1, (2**63 - 1) % 0xFFFFFFFF), (0xFFFFFFFF, 0)])
def test_any_seed_becomes_one_that_llama_cpp_takes(house: House, given: int, used: int) -> None:
    house.chat("Hi", options={"seed": given})
    assert house.engines.request.sampling.seed == used


def test_options_of_the_load_reach_the_engine(house: House) -> None:
    house.chat("Hi", options={"num_gpu": 0, "num_thread": 2, "num_batch": 64, "use_mmap": False})
    assert house.engines.options == [LoadOptions(num_gpu=0, num_thread=2, num_batch=64, use_mmap=False)]


def test_num_ctx_belongs_to_the_request_and_never_loads_again(house: House) -> None:
    for num_ctx in (64, 4096, 512):
        house.chat("Hi", options={"num_ctx": num_ctx})
        assert house.engines.request.num_ctx == num_ctx
    assert len(house.engines.made) == 1


def test_an_unknown_option_is_ignored_with_a_warning_that_guesses(house: House) -> None:
    reply = ok(house.chat("Hi", options={"temprature": 1, "api_base": "x"}))
    assert set(reply["warnings"]) == {
        "unknown option 'temprature' ignored; did you mean 'temperature'?",
        "unknown option 'api_base' ignored",
    }


def test_a_flood_of_unknown_options_gets_ten_warnings(house: House) -> None:
    reply = ok(house.chat("Hi", options={f"x{number}": 0 for number in range(50_000)}))
    assert len(reply["warnings"]) == 10


def test_a_model_without_a_template_is_asked_in_chatml_with_a_warning(house: House, tmp_path: Path) -> None:
    house.registry.put(fake_record(tmp_path / "bare.gguf", "bare", chat_template=None))
    reply = ok(house.chat("Hi", model="bare"))
    assert "ChatML" in reply["warnings"][0]
    assert "<|im_start|>user\nHi" in house.engines.last.text


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": None}])
def test_no_messages_load_the_model(house: House, body: dict[str, object]) -> None:
    reply = ok(house.post("/api/chat", model="toy", **body))
    assert (reply["done"], reply["done_reason"], reply["eval_count"]) == (True, "load", 0)
    assert reply["message"] == {"role": "assistant", "content": ""}
    assert len(house.manager.loaded()) == 1


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_no_messages_and_keep_alive_0_unload_it(house: House, path: str) -> None:
    house.chat("Hi")
    reply = ok(house.post(path, model="toy", keep_alive=0))
    assert reply["done_reason"] == "unload"
    assert house.manager.loaded() == []


@pytest.mark.parametrize("loaded", [True, False])
def test_what_was_computed_is_forgotten_on_request(house: House, loaded: bool) -> None:
    if loaded:
        house.chat("Hi")
    digest = house.registry.get("toy").digest
    ok(house.post("/api/generate", model="toy", keep_alive=0))
    assert house.engines.forgotten == []
    ok(house.post("/api/generate", model="toy", keep_alive=0, forget=True))
    assert house.engines.forgotten == [digest]


def test_a_streamed_load_is_one_line(house: House) -> None:
    response = house.post("/api/chat", model="toy", stream=True)
    assert response.content_type == "application/x-ndjson"
    assert [line["done_reason"] for line in lines(response)] == ["load"]


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(60, 60.0), (1.5, 1.5), ("5m", 300.0), ("1h30m", 5400.0), (-1, math.inf), ("-1", math.inf), (10**30, math.inf)],
)
def test_keep_alive_takes_seconds_and_durations(house: House, keep_alive: object, seconds: float) -> None:
    house.chat("Hi", keep_alive=keep_alive)
    (loaded,) = house.manager.loaded()
    if loaded.expires_at is None:
        assert seconds == math.inf
    else:
        left_s = (loaded.expires_at - datetime.now(loaded.expires_at.tzinfo)).total_seconds()
        assert seconds - 60 < left_s <= seconds


def test_keep_alive_0_frees_the_model_when_the_answer_ends(house: House) -> None:
    house.chat("Hi", keep_alive=0)
    assert house.engines.last.closed


def test_generate_answers_in_response(house: House) -> None:
    reply = ok(house.post("/api/generate", model="toy", prompt="Hi", system="Be brief."))
    assert (reply["response"], reply["done"]) == ("Hello there.", True)
    assert "message" not in reply
    assert house.engines.last.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_generate_streams_too(house: House) -> None:
    *pieces, last = lines(house.post("/api/generate", model="toy", prompt="Hi", stream=True))
    assert [piece["response"] for piece in pieces] == ["Hello", " there", "."]
    assert (last["response"], last["done_reason"]) == ("", "stop")


def test_a_raw_prompt_goes_to_the_model_as_it_is(house: House) -> None:
    house.post("/api/generate", model="toy", prompt="<|im_start|>Once", raw=True)
    (span,) = house.engines.last.prompts[-1]
    assert (span.text, span.trusted) == ("<|im_start|>Once", True)


def test_generate_takes_a_template_of_its_own(house: House) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    house.post("/api/generate", model="toy", prompt="Hi", template=template)
    assert house.engines.last.text == "[Hi]"


def test_a_template_that_does_not_parse_is_refused(house: House) -> None:
    response = house.post("/api/generate", model="toy", prompt="Hi", template="{{ .Prompt }}")
    assert response.status_code == 400


def test_generate_without_a_prompt_loads(house: House) -> None:
    reply = ok(house.post("/api/generate", model="toy", system="Be brief."))
    assert (reply["response"], reply["done_reason"]) == ("", "load")


@pytest.mark.parametrize("body", [{}, {"messages": [{"role": "user", "content": "Hi"}]}])
def test_a_model_that_cannot_chat_says_so(house: House, tmp_path: Path, body: dict[str, object]) -> None:
    record = fake_record(tmp_path / "vectors.gguf", "vectors")
    house.registry.put(replace(record, info=replace(record.info, capabilities=("embedding",))))
    assert '"vectors" does not support chat' in refused(house.post("/api/chat", model="vectors", **body), 400)
    assert house.engines.made == []
