"""Trains the bundled model and writes it as a GGUF: `python -m rustllama.demo.train OUT.gguf`.

Needs the extra `train` (PyTorch, tokenizers, gguf). Everything is seeded. See README.md beside this file.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from rustllama.demo import export
from rustllama.demo.corpus import Corpus
from rustllama.demo.model import Llama, Shape
from rustllama.demo.tokens import SPECIAL, Encoder, learn

SEED = 2026
CONTEXT_LENGTH = 2_048
LONG_ANSWER, KEPT_OF_LONG_ANSWER = 16, 8  # tokens
EXERCISES = 0.2  # of the dialogues
THREADS = 2


@dataclass(frozen=True, slots=True)
class Phase:
    """`learning_rate` is the highest; it falls along a cosine to a fiftieth."""

    steps: int
    learning_rate: float
    echoes: float  # share of the rows, until `echo_pools` are used up
    echo_pools: int
    chatter: float  # see Corpus


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast it learns; a step sees about `batch_tokens` tokens, dialogues of like length together."""

    phases: tuple[Phase, ...] = (
        Phase(steps=2_800, learning_rate=3e-3, echoes=0.5, echo_pools=60, chatter=0.0),
        Phase(steps=5_600, learning_rate=2.5e-3, echoes=0.0, echo_pools=0, chatter=0.4),
    )
    batch_tokens: int = 4_096
    warmup_steps: int = 100
    n_vocab: int = 1_536
    tokenizer_dialogues: int = 20_000
    pool: int = 1_024  # dialogues sorted by length before they are cut into batches


Row = tuple[list[int], list[bool]]


def train(recipe: Recipe) -> tuple[Llama, Tokenizer]:
    """The network and its tokenizer, learnt from the dialogues of the corpus. Prints a line now and then."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    corpus = Corpus(SEED)
    drawn = (message for _ in range(recipe.tokenizer_dialogues) for message in corpus.dialogue())
    tokenizer = learn((text for message in drawn for text in (message.role, message.content)), recipe.n_vocab)
    network = Llama(Shape(tokenizer.get_vocab_size()))
    compiled = torch.compile(network, dynamic=True)  # two minutes, then a step takes a third less
    for number, phase in enumerate(recipe.phases):
        improve(compiled, Encoder(tokenizer), recipe, phase, SEED + number)
    return network.eval(), tokenizer


def improve(network: torch.nn.Module, encoder: Encoder, recipe: Recipe, phase: Phase, seed: int) -> None:
    """One phase of the training."""
    optimizer = torch.optim.AdamW(_groups(network), lr=phase.learning_rate, betas=(0.9, 0.98), fused=True)
    batches = _batches(recipe, phase, Corpus(seed, chatter=phase.chatter), encoder, Random(seed))
    began, seen, total = time.monotonic(), 0, 0.0
    for step, rows in enumerate(itertools.islice(batches, phase.steps)):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * _pace(step, recipe.warmup_steps, phase.steps)
        loss = _loss(network, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seen, total = seen + len(rows), total + loss.item()
        if step % 100 == 99:
            passed_s = time.monotonic() - began
            print(f"step {step + 1}: loss {total / 100:.4f}, {seen} dialogues, {passed_s:.0f} s", flush=True)
            total = 0.0


def _groups(network: torch.nn.Module) -> list[dict[str, object]]:
    decayed = [weight for weight in network.parameters() if weight.dim() == 2]
    plain = [weight for weight in network.parameters() if weight.dim() != 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def _pace(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the learning rate: up in a line, then down along a cosine to a fiftieth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / (steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _batches(recipe: Recipe, phase: Phase, corpus: Corpus, encoder: Encoder, rng: Random) -> Iterator[list[Row]]:
    """Batches for ever, in random order. Echoes come first: they teach copying, and all else waits for it."""
    for number in itertools.count():
        echoes = phase.echoes if number < phase.echo_pools else 0.04
        pool = [
            _echo(rng, recipe.n_vocab) if rng.random() < echoes else _row(corpus, encoder, rng)
            for _ in range(recipe.pool)
        ]
        pool.sort(key=lambda row: len(row[0]))
        batches: list[list[Row]] = [[]]
        for row in pool:
            if (len(batches[-1]) + 1) * len(row[0]) > recipe.batch_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def _echo(rng: Random, n_vocab: int) -> Row:
    """Tokens by chance, said twice. Each token of the second time can be copied and none guessed: a dense signal for
    the attention heads that copy (induction heads, Olsson et al., 2022), which dialogues alone form too late.
    """
    said = [rng.randrange(len(SPECIAL), n_vocab) for _ in range(rng.randint(6, 24))]
    return said * 2, [False] * (len(said) + 1) + [True] * (len(said) - 1)


def _row(corpus: Corpus, encoder: Encoder, rng: Random) -> Row:
    """A dialogue as tokens. Most long last answers are cut soon after they begin: they are chosen there, the rest is
    rote. Where the system message wants a certain end they stay whole.
    """
    messages = corpus.exercise() if rng.random() < EXERCISES else corpus.dialogue()
    ids, own = encoder.dialogue(messages)
    end = len(own) - own[::-1].index(True)
    begin = end - own[:end][::-1].index(False)
    if end - begin > LONG_ANSWER and rng.random() < 0.7 and messages[0].role == "user":
        end = begin + KEPT_OF_LONG_ANSWER
        return ids[:end], own[:end]
    return ids, own


def _loss(network: torch.nn.Module, rows: list[Row]) -> Tensor:
    """Mean cross-entropy of the tokens the model must produce."""
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    own = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        own[i, : len(ids)] = torch.tensor(mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(tokens[:, :-1], own[:, 1:])
    return functional.cross_entropy(logits.float(), tokens[:, 1:][own[:, 1:]])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rustllama.demo.train OUT.gguf")
    network, tokenizer = train(Recipe())
    export.write(Path(sys.argv[1]), network, tokenizer, context_length=CONTEXT_LENGTH)


if __name__ == "__main__":
    main()
