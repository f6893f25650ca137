"""What `POST /api/create` asks for, in our form and in Ollama's: a file, and what its name adds to it."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from rustllama.api.decoding import Fields, refuse_unbuilt, typed
from rustllama.api.options import Options
from rustllama.core import Preset
from rustllama.errors import BadRequest, Unsupported

_UNBUILT = dict.fromkeys(("adapters", "messages", "modelfile", "quantize"), ())
_SOURCES = ("modelpath", "files", "from")


class CreateBody(Struct, frozen=True, kw_only=True):
    """The model's file is one of `modelpath`, `files` (a name and the digest of what was sent), `from` (a model)."""

    modelpath: str | None = None
    files: dict[str, str] = {}
    from_: str = msgspec.field(default="", name="from")
    template: str = ""
    system: str = ""
    parameters: dict[str, object] = {}
    license: str | list[str] = ""
    stream: bool = False

    @property
    def digest(self) -> str:
        """Of the one file of `files`."""
        return next(iter(self.files.values()))

    @property
    def preset(self) -> Preset:
        options = msgspec.structs.asdict(typed(Options, self.parameters, "parameters."))
        given = {name: value for name, value in options.items() if value is not None}
        terms = self.license if isinstance(self.license, str) else "\n\n".join(self.license)
        return Preset(self.template or None, self.system or None, given, terms or None)


def read_creation(raw: Fields) -> CreateBody:
    """Raises BadRequest for what is wrong, or cannot be honoured, and names the field."""
    refuse_unbuilt(raw, _UNBUILT)
    asked = typed(CreateBody, raw)
    given = [name for name in _SOURCES if raw.get(name)]
    if asked.modelpath == "":
        raise BadRequest("'modelpath' is empty: name a GGUF file.", "modelpath")
    if not given:
        raise BadRequest("'modelpath' is missing: it must be a string; or give 'files' or 'from'.", "modelpath")
    if len(given) > 1:
        raise BadRequest(f"'{given[0]}' and '{given[1]}' both say what the model is made of: give one.", given[1])
    if len(asked.files) > 1:
        raise Unsupported("'files' has more than one: send a GGUF that is not split, and without projectors.", "files")
    unknown = [name for name in asked.parameters if name not in Options.__struct_fields__]
    if unknown:
        where = f"parameters.{unknown[0][:40]}"
        raise Unsupported(f"'{where}' is not supported: send the request without it.", where)
    return asked
