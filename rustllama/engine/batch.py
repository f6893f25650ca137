"""One step of a context, as the scheduler plans it and the runner carries it out, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from rustllama.engine.drafts import worthwhile
from rustllama.engine.prefix_store import Match
from rustllama.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Clear:
    """The slot's sequence has ended; `keep` its state for later prompts."""

    slot: int
    sequence: Sequence
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Inherit:
    """The slot's sequence has ended, and `heir` goes on from its state."""

    slot: int
    sequence: Sequence
    heir: Sequence


@dataclass(frozen=True, slots=True)
class Move:
    """The state in `source` goes to the empty `target`."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Swap:
    one: int
    other: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `count` tokens of `leader` are also those of `sequence`, whose slot is empty.

    `keep` the leader's state too, as it cannot be cut there later.
    """

    source: int
    target: int
    leader: Sequence
    sequence: Sequence
    count: int
    keep: bool


@dataclass(frozen=True, slots=True)
class Restore:
    """The first tokens of a prompt were saved; the slot is empty."""

    target: int
    sequence: Sequence
    match: Match


Arrangement = Clear | Inherit | Move | Swap | Copy | Restore


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of a prompt."""

    sequence: Sequence
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Call:
    """One decode call: a token for each of the sequences, which are in adjacent slots from `slot` on, and behind them
    rows in empty slots that are thrown away.
    """

    slot: int
    sequences: tuple[Sequence, ...]
    scratch: int = 0
    draft_costs: tuple[tuple[int, float], ...] = ()  # see `drafts.worthwhile`

    def drafts(self) -> list[list[int]]:
        """What each sequence may say next: equally many tokens, as llama.cpp computes unequal ones in several calls."""
        drafters = [sequence.drafter for sequence in self.sequences if sequence.drafter is not None]
        if self.draft_costs and len(drafters) == len(self.sequences):
            trust = sum(drafter.trust for drafter in drafters) / len(drafters)
            count = worthwhile(trust, self.draft_costs)
            found = [drafter.draft(count) for drafter in drafters]
            if all(len(draft) == count for draft in found) and all(s.room > count for s in self.sequences):
                return found
        return [[] for _ in self.sequences]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: arrange the slots, then the decode calls, then one prompt call.

    The decode calls go through the slots from the lowest on; `prompt` is in the order of slots.
    """

    arrange: tuple[Arrangement, ...]
    decode: tuple[Call, ...]
    prompt: tuple[Chunk, ...]
    awaited: bool = False  # a prompt waits for what this step computes or saves


@dataclass(frozen=True, slots=True)
class Kept:
    """A state that was saved, of the first `held` of these tokens; the first `exact` came from calls of EXACT_CHUNK."""

    tokens: tuple[int, ...]
    held: int
    state: memoryview
    exact: int
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a llama_decode took, by its rows and the tokens that each of them looked at: of a prompt call in the
    mean, of a decode call those of its deepest sequence.
    """

    rows: int
    depth: float
    ns: int
    crowded: bool = False  # somebody else needed the cores: other calls will not take as long

    @property
    def ms(self) -> float:
        return self.ns / 1e6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the last step of a batch took, and what was saved in it."""

    decode: tuple[Timing, ...] = ()
    prompt: Timing | None = None
    kept: tuple[Kept, ...] = ()
