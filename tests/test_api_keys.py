"""API keys at the HTTP API: who gets in, to what, and how much of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import TestResponse

from rustllama.api.access import Call
from rustllama.api.keys import Account, Keys
from rustllama.errors import RustllamaError, TooManyRequests, Unauthorized, Unavailable
from rustllama.keys import ApiKey, digest_of
from rustllama.registry import Registry
from rustllama.settings import Settings
from tests.fakes import House, build_house, fake_record, ok, refused, turns

CHAT: dict[str, object] = {"model": "toy", "messages": turns("Hi")}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return build_house(tmp_path)


def key(secret: str, **limits: Any) -> ApiKey:
    return ApiKey(f"{secret}-key", digest_of(secret), "2026-01-01T00:00:00Z", **limits)


@dataclass(frozen=True, slots=True)
class Visitor:
    """Sends requests with the key `secret`."""

    house: House
    secret: str = "mine"

    def send(self, method: str, path: str, **body: object) -> TestResponse:
        headers = {"Authorization": f"Bearer {self.secret}"}
        return self.house.app.test_client().open(path, method=method, json=body or None, headers=headers)

    def chat(self, **fields: object) -> TestResponse:
        return self.send("POST", "/api/chat", **{**CHAT, **fields})


def visitor(house: House, secret: str = "mine", **limits: Any) -> Visitor:
    """With a key that is there now."""
    house.registry.add_api_key(key(secret, **limits))
    return Visitor(house, secret)


def test_without_keys_nobody_needs_one_and_one_that_is_sent_is_ignored(house: House) -> None:
    ok(house.get("/api/list"))
    ok(Visitor(house, "none").chat())


def test_as_soon_as_there_is_a_key_every_path_wants_it(house: House) -> None:
    visitor(house)
    rules = [(method, rule.rule) for rule in house.app.url_map.iter_rules() for method in rule.methods or ()]
    answers = {(method, path): house.send(path, b"{", method).status_code for method, path in rules}
    open_to_all = {(method, path) for method, path in rules if path in ("/", "/health") or method == "OPTIONS"}
    assert {place for place, status in answers.items() if status != 401} == open_to_all
    assert {answers[place] for place in open_to_all} == {200}
    assert house.get("/nothing").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer mine"},
        {"Authorization": "bearer  mine"},
        {"X-Api-Key": "mine"},
        {"Authorization": "Basic eDp5", "X-Api-Key": "mine"},
    ],
)
def test_a_key_comes_as_a_bearer_or_as_x_api_key(house: House, headers: dict[str, str]) -> None:
    visitor(house)
    ok(house.app.test_client().get("/api/list", headers=headers))


@pytest.mark.parametrize(
    "value", ["Bearer min", "Bearer mine2", "Bearer", "mine", "Basic mine", "Bearer mïne", "Bearer a b"]
)
def test_what_is_not_the_key_is_a_401_that_says_how_to_make_one(house: House, value: str) -> None:
    visitor(house)
    response = house.send("/api/chat", b"{", **{"Authorization": value})
    assert "`rustllama key add NAME`" in refused(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_refusal_has_the_shape_of_its_dialect(house: House) -> None:
    visitor(house)
    error = house.complete("Hi").get_json()["error"]
    assert (error["code"], error["type"]) == ("unauthorized", "invalid_request_error")
    assert house.post("/api/create", name="a").get_json()["status"] == "failed to create model"


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"require_key": True}, 401),
        ({"host": ("0.0.0.0", 1)}, 401),
        ({"host": ("0.0.0.0", 1), "insecure_no_auth": True}, 200),
        ({"host": ("::1", 1)}, 200),
        ({"console_key": "theirs"}, 401),
    ],
)
def test_a_server_without_keys_is_open_on_loopback_only(tmp_path: Path, settings: dict[str, Any], status: int) -> None:
    assert build_house(tmp_path, **settings).get("/api/list").status_code == status


def test_the_key_of_a_private_server_counts_beside_the_others(tmp_path: Path) -> None:
    house = build_house(tmp_path, console_key="theirs")
    ok(visitor(house).chat())
    ok(Visitor(house, "theirs").chat())


def test_a_key_to_chat_may_neither_create_nor_delete(house: House) -> None:
    mine = visitor(house, may_manage=False)
    sentence = refused(mine.send("DELETE", "/api/delete", name="toy"), 403)
    assert sentence == "The API key 'mine-key' may chat and not DELETE /api/delete."
    rules = [(method, rule.rule) for rule in house.app.url_map.iter_rules() for method in rule.methods or ()]
    denied = {(method, path) for method, path in rules if mine.send(method, path).status_code == 403}
    blobs = {("HEAD", "/api/blobs/<digest>"), ("POST", "/api/blobs/<digest>")}
    assert denied == {("POST", "/api/create"), ("DELETE", "/api/delete"), ("POST", "/api/pull"), *blobs}
    ok(mine.chat())


@pytest.fixture
def limited(house: House, tmp_path: Path) -> Visitor:
    """Whose key is for `toy` and for `soon`, which is not there yet; `other` is."""
    house.registry.put(fake_record(tmp_path / "other.gguf", "other"))
    return visitor(house, models=("toy", "soon"))


def test_a_key_for_some_models_sees_no_others(limited: Visitor) -> None:
    ok(visitor(limited.house, "all").chat(model="other"))
    assert ok(limited.send("GET", "/api/ps"))["models"] == []
    ok(limited.chat())
    for path in ("/api/list", "/api/tags", "/api/ps"):
        assert [model["name"][:3] for model in ok(limited.send("GET", path))["models"]] == ["toy"]
    assert [model["id"] for model in ok(limited.send("GET", "/v1/models"))["data"]] == ["toy"]
    assert "all models" in refused(limited.send("GET", "/metrics"), 403)


@pytest.mark.parametrize("name", ["other", "nosuch", "Other:latest"])
def test_a_key_for_some_models_learns_nothing_of_others(limited: Visitor, name: str) -> None:
    answers = [
        limited.chat(model=name),
        limited.send("POST", "/api/generate", model=name, prompt="Hi"),
        limited.send("POST", "/api/show", model=name),
        limited.send("POST", "/api/create", name=name, modelpath="/x.gguf"),
        limited.send("DELETE", "/api/delete", name=name),
        limited.chat(model=name, messages=[], keep_alive=0),
    ]
    sentence = f"The API key 'mine-key' may not use the model '{name}': it is for toy, soon."
    assert {refused(answer, 403) for answer in answers} == {sentence}
    assert limited.send("GET", f"/v1/models/{name}").get_json()["error"]["message"] == sentence
    assert limited.house.registry.get("other")


def test_a_model_that_is_not_there_yet_is_missing_without_naming_others(limited: Visitor) -> None:
    sentence = refused(limited.chat(model="soon"), 404)
    assert sentence.startswith("model 'soon' not found")
    assert "other" not in sentence


def test_the_rate_of_a_key_is_its_own(house: House) -> None:
    mine, theirs = visitor(house, rate_per_min=2), visitor(house, "theirs", rate_per_min=1)
    answers = [mine.chat() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "2 requests a minute" in refused(answers[2], 429)
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    ok(theirs.chat())


def test_a_bucket_fills_with_time_up_to_a_minutes_requests() -> None:
    account = Account.full(key("mine", rate_per_min=60), 0.0)
    for _ in range(60):
        account.enter(100.0)
    with pytest.raises(TooManyRequests) as told:
        account.enter(100.25)
    assert told.value.retry_after_s == 1
    account.enter(101.0)


def test_a_key_has_so_many_requests_at_a_time_until_their_answers_have_ended(house: House) -> None:
    mine = visitor(house, concurrency=2)
    running = [mine.chat(stream=True) for _ in range(2)]
    third = mine.chat()
    assert "2 requests at a time" in refused(third, 429)
    assert third.headers["Retry-After"] == "1"
    running[0].close()
    ok(mine.chat())


def test_requests_that_fail_do_not_count_for_ever(house: House) -> None:
    mine = visitor(house, concurrency=1)
    for method, path, status in (("POST", "/api/chat", 400), ("DELETE", "/api/chat", 405), ("GET", "/nothing", 404)):
        with closing(mine.send(method, path)) as answer:
            refused(answer, status)


def test_the_log_names_the_key_and_never_shows_it(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with visitor(house, "sesame").chat():
        pass
    (line,) = [record.getMessage() for record in caplog.records if record.name == "rustllama.access"]
    assert " key=sesame-key model=toy " in line
    assert " sesame " not in caplog.text


class Failing(Registry):
    failure: RustllamaError | None = None
    looks = 0

    def api_keys(self) -> list[ApiKey]:
        self.looks += 1
        if self.failure is not None:
            raise self.failure
        return super().api_keys()


@dataclass(slots=True)
class Door:
    """Keys under a clock that a test moves."""

    house: House
    registry: Failing
    now_s: float = 0.0
    keys: Keys = field(init=False)

    def __post_init__(self) -> None:
        self.keys = Keys(Settings(), self.registry, lambda: self.now_s)

    def admit(self, secret: str) -> None:
        call = Call("id", "GET", "/api/list")
        headers, environ = {"X-Api-Key": secret}, {"rustllama.call": call}
        with self.house.app.test_request_context("/api/list", headers=headers, environ_overrides=environ):
            self.keys.admit()


@pytest.fixture
def door(house: House, tmp_path: Path) -> Door:
    return Door(house, Failing(tmp_path / "rustllama.db", bundled=tmp_path / "none"))


def refuses(admit: Callable[[str], None], secret: str) -> bool:
    try:
        admit(secret)
    except Unauthorized:
        return True
    return False


def test_a_key_that_is_made_or_removed_counts_a_second_later(door: Door) -> None:
    door.admit("any")
    door.registry.add_api_key(key("mine"))
    door.now_s = 1.0
    assert (refuses(door.admit, "any"), refuses(door.admit, "mine")) == (True, False)
    door.registry.add_api_key(key("theirs"))
    door.registry.delete_api_key("mine-key")
    assert not refuses(door.admit, "mine")
    door.now_s = 2.0
    assert refuses(door.admit, "mine")


def test_the_database_is_asked_once_a_second_at_most(door: Door) -> None:
    for door.now_s in (0.0, 0.1, 0.9, 1.0, 1.5, 2.1):
        door.admit("any")
    assert door.registry.looks == 3


def test_keys_that_cannot_be_read_again_stay_what_they_were(door: Door) -> None:
    door.registry.add_api_key(key("mine"))
    door.admit("mine")
    door.registry.failure = Unavailable("locked")
    door.now_s = 5.0
    assert (refuses(door.admit, "any"), refuses(door.admit, "mine")) == (True, False)


def test_keys_that_never_could_be_read_let_nobody_in(door: Door) -> None:
    door.registry.failure = Unavailable("locked")
    with pytest.raises(Unavailable):
        door.admit("any")


def test_a_limit_is_not_forgotten_when_keys_are_read_again(door: Door) -> None:
    door.registry.add_api_key(key("mine", rate_per_min=1))
    door.admit("mine")
    door.now_s = 5.0
    with pytest.raises(TooManyRequests):
        door.admit("mine")


@pytest.mark.parametrize(("shared", "owners"), [(True, ["", ""]), (False, ["mine-key", "yours-key"])])
def test_keys_share_what_was_computed_unless_a_setting_keeps_them_apart(
    tmp_path: Path, shared: bool, owners: list[str]
) -> None:
    house = build_house(tmp_path, share_prompts=shared)
    for who in [visitor(house, secret) for secret in ("mine", "yours")]:
        ok(who.chat())
    (engine,) = house.engines.made
    assert [request.owner for request in engine.requests] == owners
    assert engine.owner == owners[-1], "so it is with what the model wrote"
