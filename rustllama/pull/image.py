"""What an image in an OCI registry offers, in Ollama's layout: a manifest of layers, one the model, others beside it.

https://github.com/opencontainers/distribution-spec, and for the layers' types Ollama's server/images.go.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlencode

import msgspec
from msgspec import Meta, Struct

from rustllama.errors import BadRequest
from rustllama.pull.offer import File, Offer
from rustllama.pull.source import Image, is_safe
from rustllama.pull.web import Web

_MANIFESTS = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
)
_LAYER = "application/vnd.ollama.image."
_MOST_TEXT_BYTES = 1 << 20
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class _Layer(Struct, frozen=True):
    digest: Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Meta(ge=0, le=1 << 50)]
    mediaType: str = ""


class _Manifest(Struct, frozen=True):
    layers: list[_Layer]


class _Token(Struct, frozen=True):
    token: str = ""
    access_token: str = ""


def ask(source: Image, web: Web) -> Offer:
    """Raises BadRequest, SourceRefused, NotFound or Unreachable."""
    url = f"{source.url}/manifests/{source.tag}"
    accept = {"Accept": ", ".join(_MANIFESTS)}
    web.trust(source.url, "", "it is private, and only public images can be pulled.")
    _introduce(web, url, accept)
    manifest, _ = web.json(url, _Manifest, accept)
    models = [layer for layer in manifest.layers if layer.mediaType == f"{_LAYER}model"]
    if not models:
        raise BadRequest(f"{source.origin} holds no model in Ollama's layout: name another image.", "model")
    if len(models) > 1:
        raise BadRequest(
            f"{source.origin} is split into {len(models)} layers, which have no names: pull another.", "model"
        )
    return Offer(
        origin=source.origin,
        files=(
            File(f"{source.url}/blobs/{models[0].digest}", models[0].digest.removeprefix("sha256:"), models[0].size),
        ),
        license="\n\n".join(_texts(web, source, manifest, "license")),
        system="\n\n".join(_texts(web, source, manifest, "system")),
        parameters=_parameters(_texts(web, source, manifest, "params")),
        notes=_notes(manifest),
    )


def _introduce(web: Web, url: str, accept: dict[str, str]) -> None:
    """Gets the token that a registry gives to anybody, where it wants one."""
    challenge = web.challenge(url, accept)
    fields = dict(_CHALLENGE.findall(challenge))
    realm = fields.pop("realm", "")
    if challenge.lower().startswith("bearer") and is_safe(realm):
        wanted = {name: value for name, value in fields.items() if name in ("service", "scope")}
        given, _ = web.json(f"{realm}?{urlencode(wanted)}", _Token)
        web.trust(
            url, f"Bearer {given.token or given.access_token}", "it is private, and only public images can be pulled."
        )


def _texts(web: Web, source: Image, manifest: _Manifest, kind: str) -> list[str]:
    layers = [layer for layer in manifest.layers if layer.mediaType == _LAYER + kind and layer.size <= _MOST_TEXT_BYTES]
    return [web.text(f"{source.url}/blobs/{layer.digest}", layer.digest.removeprefix("sha256:")) for layer in layers]


def _parameters(texts: list[str]) -> dict[str, object]:
    given: dict[str, object] = {}
    for text in texts:
        try:
            given |= msgspec.json.decode(text, type=dict[str, object])
        except msgspec.MsgspecError:
            raise BadRequest("The parameters in that image are no JSON object: pull another.", "model") from None
    return given


def _notes(manifest: _Manifest) -> tuple[str, ...]:
    kinds = {layer.mediaType.removeprefix(_LAYER) for layer in manifest.layers}
    notes = []
    if "template" in kinds:
        notes.append("the template in the model's file is used: the one beside it is a Go template, for Ollama alone")
    if kinds & {"projector", "adapter"}:
        notes.append("its projector or adapter is not fetched: rustllama does not use these yet")
    return tuple(notes)
