"""What a worker is doing, in memory that outlives it: the master makes it before the fork and reads it after a death.

Some deaths are silent, so everything is written before it is done. Writing costs a microsecond and no system call.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from rustllama.core import FileIdentity, ModelRecord
from rustllama.engine.sequence import Sequence

_READY, _AT_WORK = 0, 1  # bytes
_WORDS, _CALL, _MARKS, _END = 1 << 12, 1 << 13, 1 << 16, 1 << 17  # where the values begin
_LENGTH_BYTES = 4
_LONGEST_WORDS = 500  # characters
T = TypeVar("T")


class Mark(msgspec.Struct, frozen=True):
    """A model of which it is not known yet whether it can be loaded and computes a token."""

    model: str
    digest: str
    identity: FileIdentity
    loaded: bool = False


class Call(msgspec.Struct, frozen=True):
    """Which model computes, and for which requests."""

    model: str
    requests: list[str]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the writer did last; `call` None: nothing was computed."""

    ready: bool = False  # to serve
    marks: tuple[Mark, ...] = ()
    call: Call | None = None
    words: str = ""  # llama.cpp's, since the requests of the call changed

    @property
    def suspects(self) -> tuple[Mark, ...]:
        """The marked ones, but those who only lay in memory while another model computed."""
        call = self.call
        return tuple(mark for mark in self.marks if call is None or call.model == mark.model or not mark.loaded)


class BlackBox:
    """Written in the hub of one process, but `say`, which any thread may call."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _END)  # shared with whoever is forked off
        self._words = _Value(self._memory, _WORDS, _CALL, str)
        self._call = _Value(self._memory, _CALL, _MARKS, Call)
        self._marks = _Value(self._memory, _MARKS, _END, tuple[Mark, ...])
        self._marked: dict[object, Mark] = {}
        self._computing: tuple[str, list[Sequence]] | None = None

    def ready(self) -> None:
        """The process serves."""
        self._memory[_READY] = 1

    def say(self, words: str) -> None:
        """llama.cpp's last words so far."""
        self._words.write(words[:_LONGEST_WORDS])

    def mark(self, owner: object, mark: Mark | None) -> None:
        """Each owner has one, or none."""
        if mark is None:
            self._marked.pop(owner, None)
        else:
            self._marked[owner] = mark
        self._marks.write(tuple(self._marked.values()))

    def works_for(self, model: str, running: list[Sequence]) -> None:
        """Before a step. Models take turns, so that this one alone computes until `rests`."""
        if self._computing != (model, running):
            self._words.write("")
            self._call.write(Call(model, [sequence.request.id for sequence in running]))
            self._computing = model, running
        self._memory[_AT_WORK] = 1

    def rests(self) -> None:
        self._memory[_AT_WORK] = 0

    def read(self) -> Evidence:
        """Also of a writer that died while it wrote."""
        call = self._call.read() if self._memory[_AT_WORK] else None
        return Evidence(bool(self._memory[_READY]), self._marks.read() or (), call, self._words.read() or "")


class Witness:
    """One model's entries in the box; marked from before its load until its first token."""

    def __init__(self, box: BlackBox, record: ModelRecord) -> None:
        self._box = box
        self._model = record.name
        self._mark: Mark | None = Mark(record.name, record.digest, record.identity)
        box.mark(self, self._mark)

    def loaded(self) -> None:
        """Its weights are in memory, and a context too."""
        if self._mark is not None:
            self._mark = msgspec.structs.replace(self._mark, loaded=True)
            self._box.mark(self, self._mark)

    def unmark(self) -> None:
        """Its first token is there, or it could not be loaded, or it is gone."""
        if self._mark is not None:
            self._mark = None
            self._box.mark(self, None)

    def works_for(self, running: list[Sequence]) -> None:
        """Before a step in its turn; nobody may change the list later."""
        self._box.works_for(self._model, running)

    def rests(self) -> None:
        """At the end of its turn."""
        self._box.rests()


class _Value(Generic[T]):
    """A JSON value in a part of the memory: none, where it does not fit, or was only half written."""

    def __init__(self, memory: mmap.mmap, start: int, end: int, kind: type[T]) -> None:
        self._memory = memory
        self._start = start
        self._most_bytes = end - start - _LENGTH_BYTES
        self._kind = kind

    def write(self, value: T) -> None:
        text = msgspec.json.encode(value)
        self._put_length(0)
        if len(text) <= self._most_bytes:
            begin = self._start + _LENGTH_BYTES
            self._memory[begin : begin + len(text)] = text
            self._put_length(len(text))

    def read(self) -> T | None:
        begin = self._start + _LENGTH_BYTES
        length = int.from_bytes(self._memory[self._start : begin], "little")
        try:
            return msgspec.json.decode(self._memory[begin : begin + length], type=self._kind) if length else None
        except msgspec.DecodeError:
            return None

    def _put_length(self, length: int) -> None:
        self._memory[self._start : self._start + _LENGTH_BYTES] = length.to_bytes(_LENGTH_BYTES, "little")
