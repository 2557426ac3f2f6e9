"""What the device does next: a ``Step``. Plain Python, no JAX."""

import dataclasses

from serve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``end`` of a prompt, at position ``at`` of the packed tokens.

    A sequence that was preempted is prefilled with what it had generated. ``samples``: the chunk ends the prompt, so a
    token is drawn behind it. Which tokens are edited is in the sequence's mask.
    """

    sequence: Sequence
    start: int
    end: int
    at: int
    samples: bool

    @property
    def prefix(self) -> range:
        """Positions of a learned prefix that are written before it: those that no page in the cache has."""
        sequence = self.sequence
        return range(sequence.computed if self.start == sequence.prefix else sequence.prefix, sequence.prefix)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The newest token of a sequence that decodes, and how many tokens the step draws behind it at most.

    The token itself may be still on its way: a call before this one draws it.
    """

    sequence: Sequence
    draws: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """A sample that begins with the KV of a prompt's first one, and draws its first token in the same step.

    ``copy`` is the page to copy for it, ``(from, to)``; None if the prompt ends with a full page.
    """

    leader: Sequence
    sequence: Sequence
    copy: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """KV from ``Sequence.prompt_kv``, of the prompt's tokens from ``start`` on, that goes to the sequence's pages."""

    sequence: Sequence
    start: int


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One call of the device: chunks of prompts, or rows that decode, or both.

    Attributes:
        chunks: packed one after the other.
        rows: decoded, one token each.
        repeats: how often; more than once only without chunks.
        forks: samples that begin when the chunks are computed.
        imports: KV that is written before anything is computed.
    """

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    repeats: int = 1
    forks: list[Fork] = dataclasses.field(default_factory=list)
    imports: list[Import] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        """``"prefill"``, ``"decode"`` or ``"mixed"``: which program runs it."""
        return "decode" if not self.chunks else "mixed" if self.rows else "prefill"

    @property
    def sequences(self) -> list[Sequence]:
        """Whose tokens are computed, each once."""
        return [part.sequence for part in (*self.chunks, *self.rows)]

    @property
    def sampled(self) -> list[Sequence]:
        """Who draws: its rows, then the sequence of each last chunk with its forks."""
        forks: dict[Sequence, list[Sequence]] = {}
        for fork in self.forks:
            forks.setdefault(fork.leader, []).append(fork.sequence)
        ends = [chunk.sequence for chunk in self.chunks if chunk.samples]
        return [row.sequence for row in self.rows] + [s for end in ends for s in (end, *forks.get(end, ()))]

    @property
    def num_tokens(self) -> int:
        """Packed tokens, gaps between chunks included."""
        if not self.chunks:
            return 0
        last = self.chunks[-1]
        return last.at + last.end - last.start
