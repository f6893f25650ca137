"""What a sequence drops when its context is full and it is to go on: the oldest turns, then the oldest of its answer.

Pure: `native.Context.drop` does the same to llama.cpp's memory, as its server does in a context shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rustllama.core import ContextShift


def leaves_room(kept: int, size: int) -> bool:
    """Whether it is worth shifting when so many tokens of a context of that size stay."""
    return 4 * kept <= 3 * size


def of_chat(prompt: Sequence[int], asked: Sequence[int], asked_again: Sequence[int], num_keep: int = 0) -> ContextShift:
    """Keeps what precedes the first question, at least `num_keep` tokens and then to a border of turns; -1 is all.

    `asked` is the prompt of another question after the same system message, and `asked_again` of the same one repeated
    after an answer. How a question begins in this template is what precedes both, whatever the tokens stand for.
    """
    head = _common(prompt, asked)
    opening = _common(asked[::-1], asked_again[::-1]) - (len(asked) - head)
    turns = [head, *_repeats(prompt, head, opening)]
    keep = next((turn for turn in turns if turn >= num_keep), turns[-1]) if num_keep >= 0 else len(prompt)
    return ContextShift(keep, tuple(turn for turn in turns if turn > keep), len(prompt))


def cut(shift: ContextShift, held: int) -> tuple[int, int]:
    """Which of the `held` tokens go: the earlier half of what follows `keep`, and on to where a turn begins. With no
    earlier turn left it is half of the answer, so that the last question stays, unless that leaves no room.
    """
    half = (shift.keep + held) // 2
    if shift.turns:
        return shift.keep, next((turn for turn in shift.turns if turn >= half), shift.turns[-1])
    start = shift.keep
    if start < shift.question_end and leaves_room(shift.question_end, held):
        start = shift.question_end
    return start, (start + held + 1) // 2


def after(shift: ContextShift, start: int, end: int) -> ContextShift:
    """The places that are left when the tokens from `start` to `end` are gone."""
    if start > shift.keep:
        return shift
    turns = tuple(turn - end + start for turn in shift.turns if turn > end)
    return ContextShift(shift.keep, turns, max(shift.keep, shift.question_end - end + start))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _repeats(prompt: Sequence[int], place: int, length: int) -> Iterator[int]:
    """Where the `length` tokens before `place` end again."""
    if length > 0:
        last, pattern = prompt[place - 1], prompt[place - length : place]
        for end in range(place + length, len(prompt)):
            if prompt[end - 1] == last and prompt[end - length : end] == pattern:
                yield end
