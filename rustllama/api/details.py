"""Records of the registry as the dialects show them."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import msgspec

from rustllama.api.options import preset, recommended
from rustllama.core import ModelRecord
from rustllama.engine.lease import LoadedModel

_DIGITS = 64  # of a SHA-256


def tagged(name: str) -> str:
    """`x:latest` for `x`; clients look a model up by its full name."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def listed(record: ModelRecord) -> dict[str, object]:
    """A model of `/api/list`."""
    return {
        "name": record.name,
        "modified_at": record.modified_at,
        "format": "gguf",
        "path": record.path,
        "size": record.info.size_bytes,
        "digest": record.digest,
        "details": _details(record),
        **_origin(record),
    }


def with_tag(record: ModelRecord) -> dict[str, object]:
    """A model of `/api/tags`."""
    name = tagged(record.name)
    return {**listed(record), "name": name, "model": name}


def _origin(record: ModelRecord) -> dict[str, object]:
    """Of a file that was pulled, whose name is its digest."""
    if not record.preset.origin:
        return {}
    return {"origin": record.preset.origin, "sha256": Path(record.path).name[len("sha256-") :][:_DIGITS]}


def running(loaded: LoadedModel) -> dict[str, object]:
    """A model of `/api/ps`; one that is in use or stays for ever has no `expires_at`."""
    name, state = tagged(loaded.record.name), loaded.state
    until = {} if loaded.expires_at is None else {"expires_at": loaded.expires_at.isoformat()}
    return {
        "name": name,
        "model": name,
        "size": state.size_bytes,
        "digest": loaded.record.digest,
        "details": _details(loaded.record),
        **until,
        "size_vram": state.size_vram_bytes,
        "context_length": state.context_length,
        "slots": state.slots,
        "running": state.running,
        "queued": state.queued,
    }


def shown(record: ModelRecord) -> dict[str, object]:
    """The answer of `/api/show`."""
    info = record.info
    return {
        "modelfile": f"FROM {record.path}\n",
        "parameters": _parameters(record),
        "template": record.preset.template or info.chat_template or "",
        "system": record.preset.system or "",
        "license": record.preset.license or info.license or "",
        "details": _details(record),
        "model_info": {
            **info.metadata,
            "general.architecture": info.architecture,
            "general.parameter_count": info.parameter_count,
        },
        "capabilities": info.capabilities,
        "modified_at": record.modified_at,
        "path": record.path,
        "digest": record.digest,
        "size": info.size_bytes,
        **_origin(record),
    }


def _parameters(record: ModelRecord) -> str:
    """As in a Modelfile, a line each: what the name sets, and what the file recommends."""
    chosen = (msgspec.structs.asdict(options) for options in (recommended(record.info), preset(record)))
    given = {name: value for options in chosen for name, value in options.items() if value is not None}
    return "".join(f"{name:<30} {value}\n" for name, value in given.items())


def openai_model(record: ModelRecord) -> dict[str, object]:
    """A model of `/v1/models`."""
    created = datetime.fromisoformat(re.sub(r"\.\d+", "", record.modified_at))  # Python 3.10 reads 6 digits at most
    return {"id": record.name, "object": "model", "created": int(created.timestamp()), "owned_by": "rustllama"}


def _details(record: ModelRecord) -> dict[str, object]:
    info = record.info
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": parameter_size(info.parameter_count),
        "quantization_level": info.quantization,
    }


def parameter_size(count: int) -> str:
    """Like "135M" or "8.03B"."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}" if count < 1000 * unit else f"{count // unit}{letter}"
    return str(count)
