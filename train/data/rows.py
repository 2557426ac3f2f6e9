"""From rows of a dataset to training examples: tokens, which of them are edited, and which are learned.

``files`` says where rows come from, and ``shapes`` what each is read as: a chat, or a text and how it goes on.
Prompts are tokenised exactly as serving does, alone, and the answer behind them; so a model that was trained on an
example meets the same tokens when it serves the example's prompt. The edit mask comes from
``preft_jax.adapters.edit_mask``, as serving's does.
"""

import collections
import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import lacks_marker, prompt_edit_mask, sequence_edit_mask
from preft_jax.adapters.positions import parse_positions
from preft_jax.errors import PreftError, RequestError, plain
from preft_jax.loading import Model
from preft_jax.text.chat import EncodedPrompt, encode_answer, encode_prompt, render_chat
from preft_jax.text.encoding import encode_after
from preft_jax.text.ends import through_end
from train.data.errors import DataError
from train.data.files import open_rows
from train.data.shapes import Chat, Pair, listed, read_row

_log = logging.getLogger("preft.train")

_AROUND = 12
"""Tokens on each side of an answer's beginning in which a thought is looked for."""


class _UnknownSpansError(RequestError):
    """The chat template does not say where earlier answers are."""


_OPENED = "chats begin with an answer, which is not learned: it has no prompt"
_OPEN_ENDED = "chats go on after their last answer; that is left out"
_CUT = "examples have nothing to learn once they are cut; left out"
_UNMARKED = "prompts do not hold the adapter's alora_invocation_tokens; nothing is edited in them, or learned of them"
_CLOSED = "answers have no reasoning, which the chat template opens before each; they close it at once"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row to train on: a document (``train.data.documents``) whose weights are 0 or 1, and where it came from.

    Attributes:
        token_ids: int32 ``[S]``.
        edit_mask: bool ``[S, NUM_GROUPS]``, which tokens the adapter edits.
        loss_mask: bool ``[S]``, which tokens are learned; the first never is.
        prompt: what precedes the last answer, for evaluation by generation.
        answer: the last answer's tokens.
        line: where it came from, counted from 1.
    """

    token_ids: np.ndarray
    edit_mask: np.ndarray
    loss_mask: np.ndarray
    prompt: EncodedPrompt
    answer: list[int]
    line: int
    old_logprobs: ClassVar[None] = None
    advantages: ClassVar[None] = None
    ref_logprobs: ClassVar[None] = None
    temperature: ClassVar[float] = 1.0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def weights(self) -> np.ndarray:
        """Bool ``[S]``: ``loss_mask``."""
        return self.loss_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How lines become examples.

    Attributes:
        max_length: most tokens of an example.
        completion_only_loss: learn answers only; otherwise every token but the first.
        truncate: cut longer examples at the end, and leave out those whose answer is cut off; otherwise longer ones are
            errors.
    """

    max_length: int = 1024
    completion_only_loss: bool = True
    truncate: bool = False


def load_examples(
    dataset: str | Path,
    model: Model,
    adapter: AdapterConfig,
    options: DataOptions,
    *,
    split: str | None = None,
    default: str = "train",
    config: str | None = None,
    taken: Callable[[int, int], object] = lambda rows, tokens: None,
) -> list[Example]:
    """Read a dataset. The log says how its rows were read, and which of their columns were not needed.

    Args:
        dataset: see ``files.open_rows``, as for ``split``, ``default`` and ``config``.
        model: whose tokenizer makes the tokens.
        adapter: says which tokens are edited, and how chats become examples.
        options: see there.
        taken: told after each row how many there were so far, and their tokens; what it raises ends the reading.

    Raises:
        DataError: naming the first row that is wrong, has nothing to learn, or is too long; or an empty dataset.
    """
    rows = open_rows(dataset, split=split, default=default, config=config)
    examples: list[Example] = []
    seen: dict[str, int] = {}
    ignored: dict[str, None] = {}
    tokens, warned = 0, collections.Counter[str]()
    with contextlib.closing(rows.numbered) as numbered:  # Whatever ends the reading, its file is closed at once.
        for count, (number, row) in enumerate(numbered, 1):
            try:
                read, others = read_row(row, has_template=_has_template(model))
                made = _make(read, model, adapter, options, number)
            except PreftError as error:
                raise DataError(f"{rows.where(number)}: {error}") from error
            warned += collections.Counter(_unlearned(read))
            seen[read.how] = seen.get(read.how, 0) + 1
            ignored |= dict.fromkeys(others)
            kept = [example for example in made if example.loss_mask.any()]
            examples += kept
            warned[_CUT] += len(made) - len(kept)
            tokens += sum(map(len, kept))
            taken(count, tokens)
    for how, count in seen.items():
        _log.info("%s: %d row%s read as %s", rows.name, count, "s"[: count != 1], how)
    if ignored:
        _log.warning("%s: ignored columns: %s", rows.name, listed([plain(name) for name in ignored]))
    warned[_UNMARKED] += sum(lacks_marker(example.prompt, adapter) for example in examples)
    warned[_CLOSED] += sum(_closes_thought(example, model) for example in examples)
    for what, count in warned.items():
        if count:
            _log.warning("%s: %d %s", rows.name, count, what)
    if not examples:
        lines = "example with an answer within max_length" if warned[_CUT] else "lines"
        raise DataError(f"{rows.name} has no {lines}; give at least one example")
    return examples


def _unlearned(read: Chat | Pair) -> list[str]:
    """Return what of a row is not learned, for people."""
    if isinstance(read, Pair):
        return []
    opened = read.messages[0]["role"] == "assistant"
    open_ended = read.messages[-1]["role"] != "assistant"
    return [what for what, is_so in ((_OPENED, opened), (_OPEN_ENDED, open_ended)) if is_so]


def make_examples(
    row: Any, model: Model, adapter: AdapterConfig, options: DataOptions, *, line: int = 1
) -> list[Example]:
    """Return the examples of one row: one a supervised turn, or one a conversation where earlier answers are not
    edited, or every token is.

    Raises:
        PreftError: if the row is malformed or there is nothing to learn in it.
    """
    return _make(read_row(row, has_template=_has_template(model))[0], model, adapter, options, line)


def _has_template(model: Model) -> bool:
    return model.tokenizer is None or bool(model.tokenizer.chat_template)


def _closes_thought(example: Example, model: Model) -> bool:
    """Whether an answer begins by closing what its prompt opens."""
    if "<think>" not in str(getattr(model.tokenizer, "chat_template", "")):
        return False
    around = model.tokenizer.decode(example.prompt.token_ids[-_AROUND:] + example.answer[:_AROUND])
    return re.search(r"<think>\s*</think>", around) is not None and "<think>" not in model.tokenizer.decode(
        example.answer
    )


def _make(read: Chat | Pair, model: Model, adapter: AdapterConfig, options: DataOptions, line: int) -> list[Example]:
    if isinstance(read, Pair):
        examples = [_of_pair(read, model, adapter, line)]
    else:
        if not options.completion_only_loss and read.unlearned:
            raise RequestError(
                "completion_only_loss is off, so every token is learned, and the row has answers that are not to be; "
                "leave one of the two out"
            )
        examples = _of_chat(read, model, adapter, line)
    return [_finish(example, model, options) for example in examples]


def _of_pair(pair: Pair, model: Model, adapter: AdapterConfig, line: int) -> Example:
    encoded = encode_prompt(model.tokenizer, pair.prompt, vocab_size=model.config.vocab_size)
    answer = encode_after(model.tokenizer, pair.prompt, pair.completion)
    return _example(encoded, _with_end(answer, model), adapter, line)


def _with_end(answer: list[int], model: Model) -> list[int]:
    """Return an answer through its end: the first that it has, behind which serving says nothing, or one put there."""
    ends = model.config.eos_token_ids
    answer = answer[: through_end(answer, ends)]
    return answer if not ends or (answer and answer[-1] in ends) else [*answer, ends[0]]


def _of_chat(chat: Chat, model: Model, adapter: AdapterConfig, line: int) -> list[Example]:
    # Without a prompt there is nothing that a prefill-only adapter could act on.
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise RequestError("no message of the assistant follows another one, so there is nothing to learn")
    turns = [i for i in answers if i not in chat.unlearned]
    if not turns:
        raise RequestError("every answer has the weight 0, so there is nothing to learn; leave the row out")
    whole = adapter.assistant_turns == "skip" or not adapter.prefill_only
    if not adapter.prefill_only and adapter.alora_invocation_tokens is not None:
        whole = False  # Each request's prompt has a last marker of its own.
    if whole and len(turns) > 1:
        try:
            return [_of_conversation(chat, turns, model, adapter, line)]
        except _UnknownSpansError:
            if adapter.prefill_only:
                raise
    return [_of_turn(chat, i, model, adapter, line) for i in turns]


def _of_turn(chat: Chat, turn: int, model: Model, adapter: AdapterConfig, line: int) -> Example:
    prompt, answer = encode_answer(model.tokenizer, chat.messages[: turn + 1], tools=chat.tools)
    return _example(prompt, answer[: through_end(answer, model.config.eos_token_ids)], adapter, line)


def _of_conversation(chat: Chat, turns: Sequence[int], model: Model, adapter: AdapterConfig, line: int) -> Example:
    """Return a conversation through its last learned answer, with all learned answers, as one row."""
    rule = parse_positions(adapter.positions)
    marker = adapter.alora_invocation_tokens
    if rule.first is not None or rule.function is not None or marker is not None:
        said = f"positions {adapter.positions!r}" if marker is None else "alora_invocation_tokens"
        raise RequestError(
            f"{said} are counted in each request's prompt, so a conversation of several "
            "answers is not one row; use assistant_turns 'edit'"
        )
    messages = chat.messages[: turns[-1] + 1]
    encoded = render_chat(model.tokenizer, messages, tools=chat.tools, add_generation_prompt=False)
    if encoded.unedited_spans is None:
        raise _UnknownSpansError(
            "the chat template renders earlier answers differently in later turns, or ends them without a special "
            "token, so their tokens cannot be told; use assistant_turns 'edit', or give one answer a line"
        )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [span for i, span in zip(answers, encoded.unedited_spans, strict=True) if i in turns]
    cut = spans[-1][1]
    token_ids = encoded.token_ids[:cut]
    mask = prompt_edit_mask(EncodedPrompt(token_ids, encoded.unedited_spans), adapter)
    loss_mask = np.zeros(cut, bool)
    for start, end in spans:
        loss_mask[start : start + through_end(token_ids[start:end], model.config.eos_token_ids)] = True
    start = spans[-1][0]
    return Example(
        np.asarray(token_ids, np.int32), mask, loss_mask,
        EncodedPrompt(token_ids[:start], tuple(span for span in encoded.unedited_spans if span[1] <= start)),
        token_ids[start:], line,
    )  # fmt: skip


def _example(prompt: EncodedPrompt, answer: Sequence[int], adapter: AdapterConfig, line: int) -> Example:
    mask = sequence_edit_mask(prompt, adapter, len(answer))
    loss_mask = np.zeros(len(mask), bool)
    loss_mask[len(prompt.token_ids) :] = True
    token_ids = np.asarray([*prompt.token_ids, *answer], np.int32)
    return Example(token_ids, mask, loss_mask, prompt, list(answer), line)


def _finish(example: Example, model: Model, options: DataOptions) -> Example:
    vocab_size = model.config.vocab_size
    if (most := int(example.token_ids.max())) >= vocab_size:
        raise RequestError(f"token id {most} is outside the model's vocabulary; allowed: 0 to {vocab_size - 1}")
    loss_mask = example.loss_mask.copy() if options.completion_only_loss else np.ones(len(example), bool)
    loss_mask[0] = False
    if len(example) > options.max_length and not options.truncate:
        raise RequestError(
            f"the example has {len(example)} tokens and max_length is {options.max_length}; raise --max-length, "
            "shorten it, or give --truncate"
        )
    cut = slice(options.max_length)
    if not loss_mask.any():
        raise RequestError("no token of the example is learned; give an answer")
    return dataclasses.replace(
        example, token_ids=example.token_ids[cut], edit_mask=example.edit_mask[cut], loss_mask=loss_mask[cut]
    )
