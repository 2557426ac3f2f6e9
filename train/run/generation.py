"""How well an adapter does its task: greedy answers to held-out prompts, through the same programs as ``generate``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from preft_jax.adapters.adapter import Adapter
from preft_jax.loading import Model
from preft_jax.sampling.parameters import SamplingParams
from serve.engine.request import Request
from serve.generate import run
from train.data.rows import Example

_AT_ONCE = 16


class Answers(NamedTuple):
    """What was generated: texts, those expected, and the part of them that are equal."""

    texts: list[str]
    expected: list[str]
    exact_match: float


def answerable(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> list[Example]:
    """Return the examples whose prompts leave the model room for an answer."""
    room = _room(model, adapter)
    return [one for one in examples if len(one.prompt.token_ids) < room]


def _room(model: Model, adapter: Adapter | None) -> int:
    """Return the positions that a learned prefix leaves."""
    return model.config.max_position_embeddings - (adapter.config.prefix_length if adapter is not None else 0)


def answer(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> Answers:
    """Answer each example's prompt greedily, with as many tokens as its own answer has and some more."""
    most = max(len(example.answer) for example in examples) + 4
    room = _room(model, adapter)
    requests = [
        Request(
            prompt=example.prompt, adapter=adapter, sampling=SamplingParams(temperature=0.0),
            max_tokens=min(most, room - len(example.prompt.token_ids)),
        )
        for example in examples
    ]  # fmt: skip
    done = run(model, requests, max_num_seqs=_AT_ONCE)
    ends = model.config.eos_token_ids
    given = [_text(model.tokenizer, done[i].token_ids, ends) for i in range(len(examples))]
    expected = [_text(model.tokenizer, example.answer, ends) for example in examples]
    same = sum(a == b for a, b in zip(given, expected, strict=True))
    return Answers(given, expected, same / len(examples))


def _text(tokenizer: Any, token_ids: Sequence[int], ends: Sequence[int]) -> str:
    own = [token for token in token_ids if token not in ends]
    return tokenizer.decode(own, skip_special_tokens=True).strip() if tokenizer is not None else str(own)
