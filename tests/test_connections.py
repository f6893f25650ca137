"""Who counts as which client, and how many connections each may have."""

from __future__ import annotations

import logging
import runpy
from contextlib import ExitStack
from ipaddress import ip_network

import pytest
from gunicorn.config import Config
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

from rustllama.addresses import Proxies, client_key, is_local
from rustllama.connections import Connections, Refusals
from rustllama.errors import Busy, SettingError, TooManyRequests
from rustllama.settings import FOREVER, Settings

PROXIES = Proxies((ip_network("10.0.0.0/8"), ip_network("fd00::/8")))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("fd00::1", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.7 ,10.0.0.2", "203.0.113.7"),
        ("10.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "2001:db8::7", "2001:db8::7"),
        ("10.0.0.1", "10.0.0.3", "10.0.0.3"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7, unknown", "10.0.0.1"),
        ("203.0.113.9", "203.0.113.7", "203.0.113.9"),
    ],
)
def test_the_client_is_the_last_that_proxies_vouch_for(peer: str, forwarded: str, client: str) -> None:
    assert PROXIES.client(peer, forwarded) == client


def test_without_proxies_nobody_is_one() -> None:
    assert "127.0.0.1" not in Proxies()


def test_a_subnet_of_ipv6_is_one_client_and_an_ipv4_address_another() -> None:
    assert client_key("2001:db8::1") == client_key("2001:db8::ffff:1") != client_key("2001:db8:0:1::1")
    assert client_key("::ffff:203.0.113.7") == client_key("203.0.113.7") != client_key("203.0.113.8")


@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("10.0.0.1", False), ("", False)]
)
def test_only_loopback_is_local(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(("peer", "scheme"), [("10.0.0.1", "https"), ("127.0.0.1", "http"), ("203.0.113.7", "http")])
def test_only_a_proxy_may_say_how_it_was_asked_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, peer: str, scheme: str
) -> None:
    monkeypatch.setenv("RUSTLLAMA_PROXIES", "10.0.0.0/8")
    config = Config()
    for name, value in runpy.run_module("rustllama.gunicorn_conf").items():
        if name in config.settings:
            config.set(name, value)
    head = b"GET / HTTP/1.1\r\nX-Forwarded-Proto: https\r\nSCRIPT_NAME: /api\r\n\r\n"
    request = Request(config, IterUnreader([head]), (peer, 1))
    assert request.scheme == scheme
    assert [name for name, _ in request.headers] == ["X-FORWARDED-PROTO"]


def test_each_client_may_have_so_many_connections_and_this_machine_any() -> None:
    connections = Connections(100, 2, PROXIES)
    with ExitStack() as held:
        for peer in ("203.0.113.7", "203.0.113.7", "203.0.113.8", "127.0.0.1", "127.0.0.1", "127.0.0.1"):
            held.enter_context(connections.opened(peer))
        with pytest.raises(TooManyRequests, match="RUSTLLAMA_MAX_CONNECTIONS_PER_CLIENT"):
            held.enter_context(connections.opened("203.0.113.7"))
        assert connections.open == 6
    assert (connections.open, dict(connections.of_client)) == (0, {})


def test_a_server_that_is_full_is_nobodys_own_fault() -> None:
    connections = Connections(1, 1, PROXIES)
    with connections.opened("203.0.113.7"), pytest.raises(Busy, match="RUSTLLAMA_MAX_CONNECTIONS "):
        connections.opened("203.0.113.7").__enter__()


def test_zero_is_no_limit_for_a_client() -> None:
    connections = Connections(100, 0, PROXIES)
    with ExitStack() as held:
        for _ in range(100):
            held.enter_context(connections.opened("203.0.113.7"))


def test_connections_of_a_proxy_are_not_its_own_and_its_requests_are_their_clients() -> None:
    connections = Connections(100, 1, PROXIES)
    with ExitStack() as held:
        held.enter_context(connections.opened("10.0.0.1"))
        held.enter_context(connections.opened("10.0.0.1"))
        assert held.enter_context(connections.asked("10.0.0.1", "203.0.113.7")) == "203.0.113.7"
        with pytest.raises(TooManyRequests):
            held.enter_context(connections.asked("10.0.0.1", "203.0.113.7"))
        assert held.enter_context(connections.asked("203.0.113.7", "203.0.113.8")) == "203.0.113.7"
    assert (connections.open, dict(connections.of_client)) == (0, {})


def test_any_number_of_refusals_is_one_line_and_none_is_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refusals = Refusals()
    for reason in ["Busy"] * 5_000 + ["TooSlow"]:
        refusals.note(reason)
    refusals.tell()
    refusals.tell()
    assert caplog.messages == ["refused 5001 connections or requests: Busy (5000), TooSlow (1)"]


def test_limits_are_read_and_zero_seconds_are_no_limit() -> None:
    settings = Settings.from_env({"RUSTLLAMA_BODY_TIMEOUT": "0", "RUSTLLAMA_PROXIES": "127.0.0.1, fd00::/8"})
    assert settings.body_timeout == FOREVER
    assert [str(network) for network in settings.proxies] == ["127.0.0.1/32", "fd00::/8"]
    with pytest.raises(SettingError, match=r"RUSTLLAMA_PROXIES='10.0.0.1/8' .*host bits"):
        Settings.from_env({"RUSTLLAMA_PROXIES": "10.0.0.1/8"})
