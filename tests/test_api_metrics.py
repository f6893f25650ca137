"""`GET /metrics`: Prometheus reads it, each request counts once, and counts never go back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gevent
import pytest
from werkzeug.test import TestResponse

from rustllama.api import create_app
from rustllama.errors import Busy, InternalError, OutOfMemory
from rustllama.registry import Registry, examine
from rustllama.settings import Settings
from tests.fakes import House, build_house, fake_record, ok, refused, turns
from tests.scrape import Scrape


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def scrape(house: House) -> Scrape:
    response = house.get("/metrics")
    assert response.status_code == 200
    assert response.content_type.startswith("text/plain; version=")
    return Scrape(response.text)


def ended(response: TestResponse) -> TestResponse:
    """Read to its end, as a client does."""
    response.get_data()
    response.close()
    return response


def outcomes(house: House) -> dict[tuple[str, str], float]:
    """Counts by outcome and status, but of the scrapes."""
    samples = scrape(house).named("rustllama_requests_total")
    return {(s.labels["outcome"], s.labels["status"]): s.value for s in samples if s.labels["outcome"] != "ok"}


def test_a_server_that_did_nothing_can_be_scraped(house: House) -> None:
    found = scrape(house)
    assert found.named("rustllama_build_info")[0].labels["version"]
    assert found.value("process_resident_memory_bytes") > 0
    assert found.value("process_open_fds") > 0
    assert found.named("rustllama_answer_tokens_total") == []


def test_every_metric_is_explained_and_in_base_units(house: House) -> None:
    ok(house.chat("Hi"))
    for family in scrape(house).families:
        assert family.documentation, family.name
        assert family.name.startswith(("rustllama_", "process_"))
        assert not family.name.endswith(("_ms", "_ns", "_mb", "_percent"))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("num_predict", "outcome"), [(-1, "stop"), (2, "length")])
def test_an_answer_counts_by_why_it_ended(house: House, stream: bool, num_predict: int, outcome: str) -> None:
    ended(house.chat("Hi", stream=stream, options={"num_predict": num_predict}))
    assert outcomes(house) == {(outcome, "200"): 1}


def test_requests_without_an_answer_count_too(house: House) -> None:
    ok(ended(house.chat()))
    ok(ended(house.chat(keep_alive=0)))
    refused(ended(house.chat("Hi", model="nobody")), 404)
    refused(ended(house.post("/api/chat")), 400)
    refused(ended(house.get("/random/path")), 404)
    assert outcomes(house) == {
        ("load", "200"): 1,
        ("unload", "200"): 1,
        ("model_not_found", "404"): 1,
        ("invalid_request", "400"): 1,
        ("not_found", "404"): 1,
    }


def test_only_models_that_exist_become_labels(house: House) -> None:
    refused(ended(house.chat("Hi", model="nobody")), 404)
    ok(ended(house.chat("Hi", model="TOY:latest")))
    samples = scrape(house).named("rustllama_requests_total")
    assert {sample.labels["model"] for sample in samples} == {"", "toy"}


def test_a_full_queue_counts(house: House) -> None:
    house.script.refusal = Busy("server busy")
    refused(ended(house.chat("Hi")), 503)
    assert outcomes(house) == {("busy", "503"): 1}
    assert scrape(house).value("rustllama_first_token_seconds_count", model="toy") == 0


def test_an_answer_that_breaks_in_the_middle_counts_as_the_error(house: House) -> None:
    house.script.breaks_at, house.script.error = 2, InternalError("The engine failed.")
    ended(house.chat("Hi", stream=True))
    ended(house.chat("Hi"))
    assert outcomes(house) == {("internal_error", "500"): 2}


def test_a_client_that_leaves_counts_as_cancelled(house: House) -> None:
    response = house.chat("Hi", stream=True)
    next(response.iter_encoded())
    response.close()
    assert outcomes(house) == {("cancelled", "499"): 1}
    assert scrape(house).value("rustllama_first_token_seconds_count", model="toy") == 1


def test_the_time_to_the_first_token_counts_as_soon_as_it_is_there(house: House) -> None:
    response = house.chat("Hi", stream=True)
    found = scrape(house)
    assert found.value("rustllama_first_token_seconds_count", model="toy") == 1
    assert found.value("rustllama_first_token_seconds_sum", model="toy") > 0
    response.close()


def test_an_answer_without_a_token_has_no_first_one(house: House) -> None:
    house.script.pieces = ()
    ok(ended(house.chat("Hi")))
    assert scrape(house).value("rustllama_first_token_seconds_count", model="toy") == 0


def test_a_histogram_counts_upwards_to_its_whole(house: House) -> None:
    ok(house.chat("Hi"))
    buckets = scrape(house).named("rustllama_first_token_seconds_bucket", model="toy")
    bounds = [float(sample.labels["le"]) for sample in buckets]
    counts = [sample.value for sample in buckets]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")
    assert counts == sorted(counts)
    assert counts[-1] == scrape(house).value("rustllama_first_token_seconds_count") == 1


def test_counts_of_a_model_survive_its_unload_and_its_slots_do_not(house: House) -> None:
    ok(house.chat("Hi", keep_alive=-1))
    assert scrape(house).value("rustllama_slots", model="toy") > 0
    ok(house.chat(keep_alive=0))
    found = scrape(house)
    assert found.named("rustllama_slots") == []
    assert found.value("rustllama_model_load_seconds_count", model="toy") == 1
    assert found.value("rustllama_model_unloads_total", model="toy", reason="asked") == 1
    assert found.value("rustllama_first_token_seconds_count", model="toy") == 1


def test_a_load_that_fails_counts(house: House) -> None:
    house.script.load_error = OutOfMemory("too large")
    refused(ended(house.chat("Hi")), 503)
    found = scrape(house)
    assert found.value("rustllama_model_load_failures_total", model="toy") == 1
    assert found.value("rustllama_model_load_seconds_count", model="toy") == 0
    assert found.value("rustllama_requests_total", model="toy", outcome="out_of_memory") == 1


def test_a_name_whose_old_file_still_answers_has_one_sample(house: House, tmp_path: Path) -> None:
    ok(house.chat("Hi", keep_alive=-1))
    house.registry.put(fake_record(tmp_path / "other.gguf", "toy"))
    ok(house.chat("Hi", keep_alive=-1))
    (slots,) = scrape(house).named("rustllama_slots")
    assert slots.value == sum(engine.state().slots for engine in house.engines.made)
    assert len(house.engines.made) == 2


def test_a_second_name_of_a_file_counts_under_the_one_that_loaded_it(house: House) -> None:
    house.registry.put(replace(house.registry.get("toy"), name="alias"))
    for model in ("toy", "alias"):
        ok(ended(house.chat("Hi", model=model)))
    found = scrape(house)
    assert found.value("rustllama_first_token_seconds_count", model="toy") == 2
    assert found.value("rustllama_requests_total", model="alias") == 1


def test_two_applications_of_one_process_count_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = build_house(tmp_path / "a"), build_house(tmp_path / "b")
    ok(ended(one.chat("Hi")))
    assert outcomes(one) == {("stop", "200"): 1}
    assert outcomes(other) == {}


def test_a_server_that_stops_can_still_be_scraped(house: House) -> None:
    house.manager.draining = True
    scrape(house)


def test_metrics_are_read_only(house: House) -> None:
    assert refused(house.post("/metrics"), 405) == "/metrics does not take POST: use GET."
    head = house.send("/metrics", b"", "HEAD")
    assert (head.status_code, head.data) == (200, b"")


def test_a_real_engine_tells_what_it_did(tmp_path: Path, toys: dict[str, Path]) -> None:
    registry = Registry(tmp_path / "rustllama.db", bundled=tmp_path / "none.gguf")
    registry.put(examine("toy", toys["llama"]))
    app = create_app(Settings(home=tmp_path, num_ctx=512, slots=2, speculation=False), registry=registry)
    body = {"model": "toy", "messages": turns("let us see " * 9), "options": {"num_predict": 5, "temperature": 0}}
    answers = [ok(ended(app.test_client().post("/api/chat", json=body))) for _ in range(3)]
    found = Scrape(app.test_client().get("/metrics").text)
    app.test_client().post("/api/chat", json={"model": "toy", "keep_alive": 0})
    assert found.value("rustllama_prompts_total", model="toy", source="memory") == 2
    assert found.value("rustllama_prompt_tokens_total") == sum(answer["prompt_eval_count"] for answer in answers)
    computed = found.value("rustllama_prompt_tokens_total", source="computed")
    assert computed == sum(answer["prompt_eval_count"] - answer["prompt_eval_cached_count"] for answer in answers)
    assert found.value("rustllama_answer_tokens_total", model="toy") == 15
    assert found.value("rustllama_token_gap_seconds_count", model="toy") == 12
    assert found.value("rustllama_queue_seconds_count", model="toy") == 3
    assert found.value("rustllama_kv_cache_cells", model="toy") == 1024
    assert found.value("rustllama_prompt_store_used_bytes", place="memory") > 0


def test_a_real_engine_tells_what_its_calls_cost_once_it_has_rested(tmp_path: Path, toys: dict[str, Path]) -> None:
    registry = Registry(tmp_path / "rustllama.db", bundled=tmp_path / "none.gguf")
    registry.put(examine("toy", toys["llama"]))
    app = create_app(Settings(home=tmp_path, num_ctx=512, slots=2, num_thread=1), registry=registry)
    ok(ended(app.test_client().post("/api/generate", json={"model": "toy"})))
    unmeasured = "rustllama_unmeasured_decode_calls"
    with gevent.Timeout(30):
        while (found := Scrape(app.test_client().get("/metrics").text)).value(unmeasured, model="toy"):
            gevent.sleep(0.05)
    assert all(found.value("rustllama_decode_call_seconds", model="toy", rows=str(rows)) > 0 for rows in (1, 2, 16))
    app.test_client().post("/api/chat", json={"model": "toy", "keep_alive": 0})
