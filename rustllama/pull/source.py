"""What a user names to pull from: a repository of Hugging Face, the URL of a file, or an image in an OCI registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from rustllama.errors import BadRequest
from rustllama.origin import is_loopback

_HUGGING_FACE = ("hf.co", "huggingface.co", "www.huggingface.co")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?::([A-Za-z0-9._-]*))?")
_IMAGE = re.compile(
    rf"(?:({_PART}(?::\d{{1,5}})?|\[[0-9a-f:]+\](?::\d{{1,5}})?)/)?((?:{_PART}/)*{_PART})(?::({_PART}))?"
)
_LONGEST = 2000  # characters
_FORMS = "hf.co/USER/REPO, https://HOST/PATH/FILE.gguf or REGISTRY/NAMESPACE/MODEL:TAG"


@dataclass(frozen=True, slots=True)
class Repository:
    """On Hugging Face."""

    id: str  # USER/REPO
    quantization: str | None = None  # "": which are there?
    file: str | None = None  # its path in the repository
    revision: str = "main"

    @property
    def origin(self) -> str:
        if self.file is not None:
            return f"hf.co/{self.id}/{self.file}"
        return f"hf.co/{self.id}" + (f":{self.quantization}" if self.quantization else "")

    @property
    def name(self) -> str:
        return _name_of_file(self.file) if self.file is not None else self.origin


@dataclass(frozen=True, slots=True)
class Link:
    """A GGUF file anywhere; of a split model, its first part."""

    url: str

    @property
    def origin(self) -> str:
        """Without the query, which may be a secret."""
        return self.url.partition("?")[0]

    @property
    def name(self) -> str:
        return _name_of_file(urlsplit(self.url).path)


@dataclass(frozen=True, slots=True)
class Image:
    """In a registry of Ollama's layout."""

    registry: str  # host, or host:port
    repository: str
    tag: str
    given: str  # as it was named

    @property
    def origin(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}"

    @property
    def name(self) -> str:
        """As it was given; a port is written as names may be."""
        host, slash, path = self.given.partition("/")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", host).strip("-") + slash + path if slash else self.given

    @property
    def url(self) -> str:
        """Of the registry's API; http on loopback, where nobody listens in."""
        scheme = "http" if is_safe(f"http://{self.registry}") else "https"
        return f"{scheme}://{self.registry}/v2/{self.repository}"


Source = Repository | Link | Image
"""`origin` tells where it is, in full and without secrets; `name` is what a model from there is called by default."""


def parse(text: str, *, registry: str = "") -> Source:
    """`registry` is where models are that are named without one; "": nowhere. Raises BadRequest."""
    text = text.strip()
    if not text or len(text) > _LONGEST or not text.isprintable():
        raise BadRequest(f"That is no source of a model: name one like {_FORMS}.", "model")
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise BadRequest(f"A model cannot be pulled over '{scheme[:20]}': name {_FORMS}.", "model")
    host, _, path = (rest if separator else text).partition("/")
    if host.lower() in _HUGGING_FACE:
        return _repository(path)
    return _link(text) if separator else _image(text, registry)


def is_source(text: str) -> bool:
    """Whether it names a place by itself, and cannot be a path or a short name."""
    host, _, path = text.strip().partition("/")
    return text.strip().lower().startswith(("https://", "http://")) or (bool(path) and host.lower() in _HUGGING_FACE)


def is_safe(url: str) -> bool:
    """Whether what comes from there is what was sent: over https, or from this machine."""
    found = urlsplit(url)
    host = found.hostname or ""
    return found.scheme == "https" or (found.scheme == "http" and (host == "localhost" or is_loopback(host)))


def _repository(path: str) -> Repository:
    parts = unquote(path.partition("?")[0]).strip("/").split("/")
    found = _REPOSITORY.fullmatch("/".join(parts[:2]))
    match parts[2:]:
        case [] if found:
            return Repository(found[1], found[2])
        case ["resolve" | "blob" | "tree", revision, *file] if found and found[2] is None:
            return _at_revision(found[1], revision, "/".join(file))
    raise BadRequest("A repository of Hugging Face is named like hf.co/USER/REPO or hf.co/USER/REPO:Q4_K_M.", "model")


def _at_revision(id: str, revision: str, file: str) -> Repository:
    if not re.fullmatch(_PART, revision) or (file and not file.lower().endswith(".gguf")):
        raise BadRequest(f"'{file[:200]}' of hf.co/{id} is no GGUF file: name one that ends in .gguf.", "model")
    return Repository(id, file=file or None, revision=revision)


def _link(url: str) -> Link:
    try:
        found = urlsplit(url)
        host = found.hostname or ""
        secret = found.username is not None or found.port == 0
    except ValueError:
        raise BadRequest(f"{url[:200]!r} is no URL: name a file like https://HOST/PATH/FILE.gguf.", "model") from None
    if not host or secret:
        raise BadRequest("The URL must name a host, and hold no user or password.", "model")
    if not is_safe(url):
        raise BadRequest(f"http is not safe on the way from {host}: use https.", "model")
    if not unquote(found.path).lower().endswith(".gguf"):
        raise BadRequest(f"'{found.path[:200]}' is no GGUF file: name one that ends in .gguf.", "model")
    return Link(url.partition("#")[0])


def _image(text: str, registry: str) -> Image:
    found = _IMAGE.fullmatch(text)
    if not found:
        raise BadRequest(f"{text[:200]!r} is no source of a model: name one like {_FORMS}.", "model")
    host, path, tag = found[1], found[2], found[3] or "latest"
    if host is not None and not _is_host(host):
        host, path = None, f"{host}/{path}"
    if host is None and not registry:
        raise BadRequest(
            f"{text[:200]!r} does not say where that model is: name {_FORMS}; or set RUSTLLAMA_REGISTRY to the "
            "registry of models that are named without one.",
            "model",
        )
    return Image(host or registry, path if "/" in path else f"library/{path}", tag, text)


def _is_host(text: str) -> bool:
    """As Docker tells a registry from a namespace."""
    return "." in text or ":" in text or text == "localhost"


def _name_of_file(path: str) -> str:
    stem = re.sub(r"(?i)(-\d{5}-of-\d{5})?\.gguf$", "", unquote(path).rpartition("/")[2])
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:64].strip("._-") or "model"
