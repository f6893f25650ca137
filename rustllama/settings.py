"""Every setting of rustllama: read once from the environment, frozen, each with its unit and default."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rustllama.errors import SettingError
from rustllama.origin import Origin, is_loopback

DEFAULT_PORT = 11435
FOREVER = math.inf

Network = IPv4Network | IPv6Network

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_duration_s(text: str) -> float:
    """Seconds of `"300"`, `"5m"`, `"1h30m"`; anything negative is FOREVER. Raises ValueError."""
    text = text.strip()
    if text.startswith("-"):
        parse_duration_s(text[1:])
        return FOREVER
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    pieces = _DURATION.findall(text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text:
        raise ValueError('a duration is seconds or like "5m"; negative is for ever')
    return sum(float(number) * _SECONDS[unit] for number, unit in pieces)


def parse_size_bytes(text: str) -> int:
    """Bytes of `"2000000"`, `"8GiB"`, `"500 MB"`. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError('a size is bytes or like "8GiB"')
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `host`, `:port`, `host:port`, `[::1]:port` or a URL. Raises ValueError."""
    text = text.strip().rstrip("/")
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise ValueError("an address is host, host:port or http://host:port")
    bare_v6 = rest.count(":") > 1 and not rest.startswith("[")
    url = urlsplit(f"//[{rest}]" if bare_v6 else f"//{rest}")
    default = {"http": 80, "https": 443}.get(scheme, DEFAULT_PORT)
    return url.hostname or "localhost", default if url.port is None else url.port


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.strip().lower() not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text.strip().lower()

    return parse


def _yes(text: str) -> bool:
    return _one_of("0", "1", "false", "true", "no", "yes", "off", "on")(text) in ("1", "true", "yes", "on")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _hosts(text: str) -> tuple[str, ...]:
    return tuple(name if name == "*" else _host(name) for name in _names(text))


def _host(name: str) -> str:
    bare_v6 = name.count(":") > 1 and not name.startswith("[")
    try:
        return Origin.parse(f"http://[{name}]" if bare_v6 else f"http://{name}").host
    except ValueError:
        raise ValueError("host names or addresses by comma, like chat.example.com, or *") from None


def _origins(text: str) -> tuple[str, ...]:
    for name in _names(text):
        if name not in ("*", "null"):
            Origin.parse(name)
    return _names(text)


def _limit_s(text: str) -> float:
    return parse_duration_s(text) or FOREVER


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(name) for name in _names(text))
    except ValueError as error:
        raise ValueError(f'addresses or networks by comma, like "127.0.0.1, 10.0.0.0/8"; {error}') from None


def default_home() -> Path:
    """The platform's state folder for rustllama."""
    from platformdirs import user_state_path  # only where no folder was named: it costs start-up time

    return user_state_path("rustllama")


def _setting(parse: Callable[[str], object], default: object, help: str) -> Any:
    """A field that RUSTLLAMA_<NAME> sets; `help` names its unit, and what None stands for."""
    return field(default=default, metadata={"parse": parse, "help": help})


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


@dataclass(frozen=True, slots=True)
class Settings:
    """Read with `Settings.from_env(os.environ)`; a bad value raises SettingError naming variable and value."""

    home: Path | None = _setting(_path, None, "state folder; default: the platform's own")
    models: Path | None = _setting(
        _path, None, "folder of the models that are pulled; default: models in RUSTLLAMA_HOME"
    )
    registry: str = _setting(
        str.strip, "", "OCI registry of models that are pulled by a name alone, like registry.ollama.ai; default: none"
    )
    host: tuple[str, int] = _setting(
        parse_address, ("localhost", DEFAULT_PORT), "address to listen at, or for the console to talk to"
    )
    workers: int = _setting(_whole(1, 64), 1, "server processes; each keeps its own copy of the models")
    load: tuple[str, ...] = _setting(_names, (), "models to load before the first request, by comma")
    keep_alive: float = _setting(parse_duration_s, 300.0, "time an idle model stays loaded; negative: for ever")
    memory_limit: int | None = _setting(
        parse_size_bytes, None, "memory for all models; default: what the machine or its cgroup has free"
    )
    prompt_cache_memory: int | None = _setting(
        parse_size_bytes,
        None,
        "memory for computed prompts, within the limit; 0: none are kept or shared; default: a tenth, at most 1 GiB",
    )
    prompt_cache_disk: int = _setting(
        parse_size_bytes, 0, "disk for computed prompts, so that they survive a restart; 0: none are written"
    )
    reuse_text: bool = _setting(_yes, True, "take what a model wrote as the tokens it wrote when its text comes back")
    share_prompts: bool = _setting(_yes, True, "let API keys share computed prompts; 0: each key has its own")
    reproducible: bool = _setting(_yes, False, "give every answer bit for bit the same, whatever else runs: slower")
    speculation: bool = _setting(_yes, True, "draft what an answer quotes of its conversation, where that is faster")
    num_ctx: int = _setting(_whole(16, 1 << 22), 8192, "tokens of a usual context; less where memory is short")
    slots: int | None = _setting(
        _whole(1, 256), None, "answers a model generates at once; default: as spare memory allows, at most 16"
    )
    max_queue: int = _setting(_whole(0, 1 << 20), 512, "requests that wait for a slot before others get 503")
    num_thread: int | None = _setting(
        _whole(1, 512),
        None,
        "threads of llama.cpp, fewer where others compute; default: the physical cores this process may use",
    )
    num_batch: int = _setting(
        _whole(1, 8192), 256, "tokens of the largest prompt call; without a GPU, more is no faster"
    )
    num_gpu: int = _setting(_whole(-1, 1024), -1, "layers on the GPU; -1: all that fit")
    use_mmap: bool = _setting(_yes, True, "map the weights instead of reading them")
    flash_attention: str = _setting(_one_of("auto", "on", "off"), "auto", "auto (what is faster), on or off")
    kv_cache_type: str = _setting(
        _one_of("f16", "f32"), "f16", "numbers of the KV cache: f16, or f32 for twice the memory"
    )
    gap_ms: int = _setting(_whole(1, 60_000), 200, "milliseconds between tokens that a new prompt may cause")
    request_timeout: float = _setting(
        parse_duration_s, 0.0, "time after which an answer ends with what it has, queue and prompt included; 0: none"
    )
    drain_timeout: float = _setting(parse_duration_s, 30.0, "time that running answers get when the server stops")
    max_body: int = _setting(parse_size_bytes, 20 * 1024**2, "size of the largest request body")
    probe_timeout: float = _setting(parse_duration_s, 120.0, "time that proving a new model file may take")
    require_key: bool = _setting(_yes, False, "do not start, nor serve anybody, without an API key")
    insecure_no_auth: bool = _setting(_yes, False, "listen beyond loopback though there is no API key")
    console_key: str = _setting(
        str.strip, "", "an API key that is in no database; the console's private server uses it"
    )
    tls_cert: Path | None = _setting(_path, None, "PEM file of a certificate and its chain: the server speaks https")
    tls_key: Path | None = _setting(_path, None, "PEM file of its key; default: in that of the certificate")
    hosts: tuple[str, ...] = _setting(
        _hosts, (), "names by which clients call this server, by comma, besides its own and local ones; *: any"
    )
    origins: tuple[str, ...] = _setting(
        _origins, (), "origins of web pages that may use it, by comma, like https://chat.example.com; *: any"
    )
    head_timeout: float = _setting(_limit_s, 10.0, "time that the head of a request may take; 0: no limit")
    body_timeout: float = _setting(
        _limit_s, 30.0, "time that the body of a request may take: more for large ones on slow links; 0: no limit"
    )
    write_timeout: float = _setting(
        _limit_s, 60.0, "time after which a client that takes nothing of its answer is cut off; 0: no limit"
    )
    max_connections: int = _setting(
        _whole(1, 1 << 20),
        4096,
        "connections to a server process before others get 503; less where it may open fewer files",
    )
    max_connections_per_client: int = _setting(
        _whole(0, 1 << 20),
        256,
        "connections, or requests through a proxy, of one other machine before more get 429; 0: no limit",
    )
    proxies: tuple[Network, ...] = _setting(
        _networks, (), "addresses or networks, by comma, of proxies whose X-Forwarded-For and -Proto are believed"
    )
    stop_on_eof: bool = _setting(_yes, False, "stop when standard input closes; the console's private server uses it")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Unset and empty variables take the default. Raises SettingError."""
        values: dict[str, object] = {}
        for spec in fields(cls):
            variable = variable_of(spec.name)
            text = environ.get(variable, "")
            if not text.strip():
                continue
            try:
                values[spec.name] = spec.metadata["parse"](text)
            except ValueError as error:
                raise SettingError(f"{variable}={text!r} is not valid: expected {error}.") from None
        return cls(**values)  # type: ignore[arg-type]

    @property
    def home_path(self) -> Path:
        return self.home if self.home is not None else default_home()

    @property
    def listen_hosts(self) -> tuple[str, ...]:
        """Addresses to bind: `localhost` is both loopbacks, the second one where there is IPv6."""
        host = self.host[0]
        return ("127.0.0.1", "::1") if host == "localhost" else (host,)

    @property
    def beyond_loopback(self) -> bool:
        """Whether other machines may reach the server."""
        return not all(map(is_loopback, self.listen_hosts))

    @property
    def database_path(self) -> Path:
        return self.home_path / "rustllama.db"

    @property
    def models_path(self) -> Path:
        return self.models if self.models is not None else self.home_path / "models"

    @property
    def blobs_path(self) -> Path:
        """The folder of model files that the server keeps itself."""
        return self.models_path / "blobs"

    @property
    def prompts_path(self) -> Path:
        """The folder of what `prompt_cache_disk` keeps."""
        return self.home_path / "prompts"


def variable_of(name: str) -> str:
    """The environment variable of a field."""
    return f"RUSTLLAMA_{name.upper()}"


def table() -> list[tuple[str, str, str]]:
    """Rows of variable, default and meaning, for `serve --help` and the README."""
    return [(variable_of(spec.name), _shown(spec.default), spec.metadata["help"]) for spec in fields(Settings)]


def switches() -> set[str]:
    """The variables that say yes or no."""
    return {variable_of(spec.name) for spec in fields(Settings) if isinstance(spec.default, bool)}


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ":".join(str(part) for part in value)
    return str(int(value)) if isinstance(value, (bool, float)) else str(value)
