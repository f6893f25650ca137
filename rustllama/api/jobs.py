"""The one form in which every dialect asks for an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from rustllama.api.options import Options
from rustllama.api.requests import Turn


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of which model: messages for its template, or a raw prompt."""

    model: str  # as the request gives it
    options: Options
    messages: tuple[Turn, ...] = ()
    raw_prompt: str | None = None
    template: str | None = None  # Jinja, in the place of the model's own
    keep_alive_s: float | None = None  # None: the server's setting
    forget: bool = False  # an unload: the computed prompts too
    truncate: bool = True  # whether old turns may be left out
    progress: bool = False  # whether to tell what the first token waits for
    shift: bool = False  # whether the answer may go on in a full context
    warnings: tuple[str, ...] = ()
    owner: str = ""  # who shares what was computed with nobody else; "": shares it with all others

    def telling(self, progress: bool, *, streamed: bool) -> Job:
        """The same, with what the request asks for."""
        if progress and not streamed:
            warning = "'progress' is told in a stream only, and was ignored: it needs 'stream': true"
            return replace(self, warnings=(*self.warnings, warning))
        return replace(self, progress=progress)

    def completed(self, options: Options, system: str | None) -> Job:
        """The same, with what the request leaves open: options, and a system message where there is none."""
        given = {name: value for name, value in msgspec.structs.asdict(self.options).items() if value is not None}
        messages = self.messages
        if system and messages and all(turn["role"] != "system" for turn in messages):
            messages = ({"role": "system", "content": system}, *messages)
        return replace(self, options=msgspec.structs.replace(options, **given), messages=messages)

    @property
    def is_empty(self) -> bool:
        """Asks only for the model to be loaded, or unloaded."""
        return not self.messages and not self.raw_prompt
