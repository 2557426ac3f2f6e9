"""What a benchmark does: its contenders, and the requests that they serve in each round, drawn from its options."""

import argparse
import math
from collections.abc import Sequence

import numpy as np

from serve.bench.arrivals import draw_arrivals
from serve.bench.contest import Contender, Entry
from serve.bench.datasets import Conversation, Trace, read_sharegpt, read_trace
from serve.bench.load import LoadRequest
from serve.bench.sides import Side, Vocabulary
from serve.bench.workload import Texts, conversation_texts, draw_users, parse_range, random_texts, trace_texts


class Draws:
    """Draws what is asked for in each round; every draw depends on the seed, the round and its own name alone."""

    def __init__(self, args: argparse.Namespace, vocabulary: Vocabulary):
        self._args = args
        self._vocabulary = vocabulary
        self._output_len = None if args.output_len is None else parse_range(args.output_len, "--output-len")
        self._input_len = parse_range(args.input_len or "32:256", "--input-len")
        self._trace: Trace | None = None
        self._conversations: list[Conversation] = []
        if args.dataset_name == "trace":
            minutes = args.trace_minutes
            if minutes is None:
                minutes = 1.0 if args.num_prompts is None else math.inf
            self._trace = read_trace(
                args.dataset_path, minutes=minutes, speedup=args.trace_speedup, limit=args.num_prompts
            )
        elif args.dataset_name == "sharegpt":
            self._conversations = read_sharegpt(args.dataset_path)

    def _rng(self, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._args.seed, number, stream])

    def texts(self, number: int) -> Texts:
        """Return prompts and output lengths of a round."""
        rng, vocabulary, count = self._rng(number, 0), self._vocabulary, self._args.num_prompts or 32
        if self._trace is not None:
            return trace_texts(rng, self._trace, vocab_size=vocabulary.size, max_len=vocabulary.max_len)
        if self._conversations:
            return conversation_texts(
                rng,
                count,
                self._conversations,
                vocabulary.encode,
                output_len=self._output_len,
                max_len=vocabulary.max_len,
            )
        output_len = self._output_len or (16, 64)
        return random_texts(
            rng, count, input_len=self._input_len, output_len=output_len, vocab_size=vocabulary.size,
            prefix_len=self._args.random_prefix_len,
        )  # fmt: skip

    def arrivals(self, number: int, count: int) -> list[float]:
        """Return when the requests of a round arrive."""
        if self._trace is not None:
            return self._trace.arrivals
        return draw_arrivals(self._rng(number, 1), count, self._args.request_rate, self._args.burstiness)

    def users(self, number: int, count: int, num_adapters: int) -> Sequence[int | None]:
        """Return the adapter of each request of a round; None where there are no adapters."""
        if not num_adapters:
            return [None] * count
        args = self._args
        return draw_users(
            self._rng(number, 2 + num_adapters), count, num_adapters, args.adapter_distribution, args.zipf_alpha
        )


def _requests(arrivals: Sequence[float], texts: Texts, users: Sequence[int | None]) -> list[LoadRequest]:
    return [
        LoadRequest(arrival=arrival, prompt=prompt, max_tokens=length, user=user)
        for arrival, prompt, length, user in zip(arrivals, texts.prompts, texts.output_lens, users, strict=True)
    ]


def make_entries(args: argparse.Namespace, side: Side) -> list[Entry]:
    """Return base once, and every other mode with each number of adapters.

    Contenders of a round have the same prompts, lengths and arrivals, and those with as many adapters the same users.
    What is not counted is drawn like one round more, its adapters in turn.

    Raises:
        ConfigError: for requests that cannot be drawn.
    """
    draws = Draws(args, side.vocabulary)
    *rounds, warmup = [draws.texts(number) for number in range(args.rounds + 1)]
    longest = max(len(p) + n for text in (*rounds, warmup) for p, n in zip(text.prompts, text.output_lens, strict=True))
    side.facts |= {name: sum(getattr(text, name) for text in rounds) for name in ("skipped", "clipped")}

    def entry(contender: Contender) -> Entry:
        n = contender.num_adapters
        in_turn = [i % n if n else None for i in range(len(warmup.prompts))]
        return Entry(
            contender,
            lambda: side.target(contender, longest),
            _requests([0.0] * len(in_turn), warmup, in_turn)[: args.num_warmups],
            [
                _requests(draws.arrivals(i, len(text.prompts)), text, draws.users(i, len(text.prompts), n))
                for i, text in enumerate(rounds)
            ],
            in_process=side.in_process,
        )

    return [entry(Contender(mode, n)) for mode in side.modes for n in ((0,) if mode == "base" else side.counts)]
