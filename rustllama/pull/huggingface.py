"""What a repository of Hugging Face offers, by its documented API: a commit, and the files it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import quote

from msgspec import Meta, Struct

from rustllama.errors import BadRequest
from rustllama.pull.offer import File, Offer
from rustllama.pull.quantization import Entry, Variant, choose, projectors, variants
from rustllama.pull.source import Repository, is_safe
from rustllama.pull.web import Web

ENDPOINT = "https://huggingface.co"
TOKEN_PAGE = "https://huggingface.co/settings/tokens"

_MOST_PAGES = 50  # of a listing, a thousand files each
_Size = Annotated[int, Meta(ge=0, le=1 << 50)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Lfs(Struct, frozen=True):
    oid: _Digest
    size: _Size


class _Item(Struct, frozen=True):
    type: str
    path: str
    size: _Size = 0
    lfs: _Lfs | None = None


class _Model(Struct, frozen=True):
    """`cardData` is what the repository's README says of it in YAML: anything."""

    sha: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")]
    cardData: dict[str, object] | None = None
    tags: list[str] = []


def ask(source: Repository, web: Web, environ: Mapping[str, str]) -> Offer:
    """Raises BadRequest, SourceRefused, NotFound or Unreachable."""
    endpoint = _endpoint(environ)
    token = environ.get("HF_TOKEN", "").strip()
    web.trust(endpoint, f"Bearer {token}" if token else "", _advice(source, token))
    model, _ = web.json(f"{endpoint}/api/models/{source.id}/revision/{quote(source.revision)}", _Model)
    entries = _listed(web, f"{endpoint}/api/models/{source.id}/tree/{model.sha}?recursive=true")
    place = f"hf.co/{source.id}"
    chosen = choose(variants(entries), source.quantization, place) if source.file is None else _named(entries, source)
    return Offer(
        origin=source.origin if source.file or source.quantization else f"{place}:{chosen.label}",
        files=tuple(
            File(f"{endpoint}/{source.id}/resolve/{model.sha}/{quote(part.path)}", part.sha256, part.size_bytes)
            for part in chosen.parts
        ),
        license=_license(model),
        notes=_notes(chosen, entries, source),
    )


def _endpoint(environ: Mapping[str, str]) -> str:
    endpoint = environ.get("HF_ENDPOINT", "").strip().rstrip("/") or ENDPOINT
    if not is_safe(endpoint):
        raise BadRequest(f"HF_ENDPOINT={endpoint[:200]!r} is not valid: expected an https URL.", "model")
    return endpoint


def _advice(source: Repository, token: str) -> str:
    page = f"{ENDPOINT}/{source.id}"
    if token:
        return f"the token in HF_TOKEN may not read it; see whether {page} exists and asks for an agreement."
    return f"see whether {page} exists; if it asks for an agreement, give it, and set HF_TOKEN to one of {TOKEN_PAGE}."


def _listed(web: Web, url: str) -> list[Entry]:
    entries: list[Entry] = []
    for _ in range(_MOST_PAGES):
        items, url = web.json(url, list[_Item])
        entries += [_entry(item) for item in items if item.type == "file"]
        if not url:
            break
    return entries


def _entry(item: _Item) -> Entry:
    return Entry(item.path, item.lfs.size, item.lfs.oid) if item.lfs else Entry(item.path, item.size)


def _named(entries: list[Entry], source: Repository) -> Variant:
    """The file with all parts of its model."""
    for variant in variants(entries):
        if any(part.path == source.file for part in variant.parts):
            return variant
    raise BadRequest(f"hf.co/{source.id} has no model in {source.file}: name one of its GGUF files.", "model")


def _license(model: _Model) -> str:
    told = (model.cardData or {}).get("license")
    tags = [tag.removeprefix("license:") for tag in model.tags if tag.startswith("license:")]
    return told if isinstance(told, str) else (tags or [""])[0]


def _notes(chosen: Variant, entries: list[Entry], source: Repository) -> tuple[str, ...]:
    notes = []
    if source.quantization is None and source.file is None:
        notes.append(f"{chosen.label} is taken; hf.co/{source.id}: lists what else is there")
    if projectors(entries):
        notes.append("the model can see, by a projector that rustllama does not use yet: it is not fetched")
    return tuple(notes)
