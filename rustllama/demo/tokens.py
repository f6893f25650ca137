"""Owns the model's tokenizer: byte-level BPE trained on the corpus, and dialogues as token ids. Training only."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from rustllama.demo.corpus import Message

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, START, END)


def learn(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE of `n_vocab` tokens, split into words as GPT-2 does; the markers of ChatML are its first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Dialogues to ids, piece by piece as the server does: markers as ids of their own, text as plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        self._plain = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
        self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        self._start, self._end = (tokenizer.token_to_id(text) for text in (START, END))
        self._line = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def dialogue(self, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the dialogue, and which of them the model must produce: its answers with their end marker."""
        ids: list[int] = []
        own: list[bool] = []
        for message in messages:
            is_answer = message.role == "assistant"
            head = [self._start, *self.text(message.role), *self._line]
            body = [*self.text(message.content), self._end]
            ids += [*head, *body, *self._line]
            own += [False] * len(head) + [is_answer] * len(body) + [False] * len(self._line)
        return ids, own
