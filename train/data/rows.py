"""From lines of a JSONL file to training examples: tokens, which of them are edited, and which are learned.

A line is ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``; other columns are ignored. Prompts are
tokenised exactly as serving does, alone, and the answer behind them; so a model that was trained on an example meets
the same tokens when it serves the example's prompt. The edit mask comes from
``preft_jax.adapters.edit_mask``, as serving's does.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import extend_edit_mask, prompt_edit_mask
from preft_jax.adapters.positions import parse_positions
from preft_jax.errors import PreftError, RequestError, did_you_mean, plain
from preft_jax.loading import Model
from preft_jax.text.chat import EncodedPrompt, check_messages, encode_answer, encode_prompt, encode_text, render_chat

_log = logging.getLogger("preft.train")

_FORMS = (("messages",), ("prompt", "completion"))

_KNOWN = ("messages", "prompt", "completion")

_NOT_RENDERED = "is not rendered into the prompt; describe the tools in the system message"
_NOT_TEXT = "is no text, and the model reads and writes nothing else; leave such lines out"
_MADE_HERE = "is made here, from the text; leave it out"
_PREFERENCE = "is part of a preference, and here one answer is learned; give that one as 'completion'"
_REFUSED = {
    "text": (
        "does not say where the prompt ends, and a prefill-only adapter acts on the prompt alone; give 'prompt' and "
        "'completion', or 'messages'"
    ),
    "chat_template_kwargs": "is not given to the chat template; leave it out",
    **dict.fromkeys(("tools", "functions"), _NOT_RENDERED),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NOT_TEXT),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), _MADE_HERE),
    **dict.fromkeys(("chosen", "rejected"), _PREFERENCE),
}
"""Columns that give a line another meaning than its text has -> why they are refused; other columns are ignored."""

_MOST_NAMED = 8


class DataError(PreftError, ValueError):
    """A dataset that cannot be trained on; the message names the file and the line."""


class _UnknownSpansError(RequestError):
    """The chat template does not say where earlier answers are."""


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


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and content of each line that is not blank, without columns that are null.

    Raises:
        DataError: for a file that cannot be read, or a line that is no JSON object of an allowed form, or has a column
            that gives it another meaning.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a JSONL file in UTF-8") from error


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this is not JSON ({error}); each line is one object") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a {type(row).__name__}; each line is an object with 'messages', or 'prompt' and 'completion'"
        )
    row = {name: value for name, value in row.items() if value is not None}  # As if the column were not there.
    for name, reason in _REFUSED.items():
        if row.get(name, "") not in ("", [], {}):
            raise DataError(f"{where}: {name!r} {reason}")
    if tuple(name for name in _KNOWN if name in row) not in _FORMS:
        found = [plain(name) + ("" if name in _KNOWN else did_you_mean(name, _KNOWN)) for name in row]
        raise DataError(
            f"{where}: has {_listed(found) or 'nothing'}; give 'messages' alone, or 'prompt' and 'completion'"
        )
    return row


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def load_examples(path: Path, model: Model, adapter: AdapterConfig, options: DataOptions) -> list[Example]:
    """Read a dataset. Columns that are not needed are ignored and named once, in the log.

    Raises:
        DataError: naming the first line that is wrong, has nothing to learn, or is too long; or an empty file.
    """
    examples: list[Example] = []
    ignored: dict[str, None] = {}
    left_out = 0
    for number, row in read_lines(path):
        ignored |= dict.fromkeys(name for name in row if name not in _KNOWN)
        try:
            made = make_examples(row, model, adapter, options, line=number)
        except PreftError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        kept = [example for example in made if example.loss_mask.any()]
        examples += kept
        left_out += len(made) - len(kept)
    if ignored:
        _log.warning("%s: ignored columns: %s", path, _listed([plain(name) for name in ignored]))
    if left_out:
        _log.warning("%s: of %d examples nothing is learned once they are cut; left out", path, left_out)
    if not examples:
        raise DataError(f"{path} has no {'such lines' if left_out else 'lines'}; give at least one example")
    return examples


def make_examples(
    row: dict[str, Any], model: Model, adapter: AdapterConfig, options: DataOptions, *, line: int = 1
) -> list[Example]:
    """Return the examples of one row: one a supervised turn, or one a conversation where earlier answers are not
    edited, or every token is.

    Raises:
        PreftError: if the row is malformed or there is nothing to learn in it.
    """
    if "messages" in row:
        examples = _of_chat(check_messages(row["messages"]), model, adapter, line)
    else:
        examples = [_of_pair(row["prompt"], row["completion"], model, adapter, line)]
    return [_finish(example, model, options) for example in examples]


def _of_pair(prompt: Any, completion: Any, model: Model, adapter: AdapterConfig, line: int) -> Example:
    if not isinstance(prompt, str):
        messages = [*check_messages(prompt), *_answer_messages(completion)]
        return _of_turn(messages, model, adapter, line)
    if not isinstance(completion, str):
        raise RequestError(f"completion is a {type(completion).__name__}; a prompt that is text has one that is text")
    if not completion:
        raise RequestError("the completion is empty, so there is nothing to learn; give the text that is to follow")
    encoded = encode_prompt(model.tokenizer, prompt, vocab_size=model.config.vocab_size)
    answer = encode_text(model.tokenizer, completion, add_special_tokens=False)
    return _example(encoded, _with_end(answer, model), adapter, line)


def _answer_messages(completion: Any) -> list[dict[str, str]]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    messages = check_messages(completion)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RequestError("the completion of a chat is one message of the assistant; give longer chats as 'messages'")
    return messages


def _with_end(answer: list[int], model: Model) -> list[int]:
    ends = model.config.eos_token_ids
    return answer if not ends or (answer and answer[-1] in ends) else [*answer, ends[0]]


def _of_chat(messages: list[dict[str, str]], model: Model, adapter: AdapterConfig, line: int) -> list[Example]:
    # Without a prompt there is nothing that a prefill-only adapter could act on.
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        raise RequestError("no message of the assistant follows another one, so there is nothing to learn")
    whole = adapter.assistant_turns == "skip" or not adapter.prefill_only
    if whole and len(turns) > 1:
        try:
            return [_of_conversation(messages[: turns[-1] + 1], model, adapter, line)]
        except _UnknownSpansError:
            if adapter.prefill_only:
                raise
    return [_of_turn(messages[: i + 1], model, adapter, line) for i in turns]


def _of_turn(messages: list[dict[str, str]], model: Model, adapter: AdapterConfig, line: int) -> Example:
    prompt, answer = encode_answer(model.tokenizer, messages)
    return _example(prompt, answer, adapter, line)


def _of_conversation(messages: list[dict[str, str]], model: Model, adapter: AdapterConfig, line: int) -> Example:
    """Return a whole conversation, all of its answers learned, as one row."""
    rule = parse_positions(adapter.positions)
    if rule.first is not None or rule.function is not None:
        raise RequestError(
            f"positions {adapter.positions!r} are counted in each request's prompt, so a conversation of several "
            "answers is not one row; use assistant_turns 'edit'"
        )
    encoded = render_chat(model.tokenizer, messages, add_generation_prompt=False)
    if encoded.unedited_spans is None:
        raise _UnknownSpansError(
            "the chat template renders earlier answers differently in later turns, so their tokens cannot be told; use "
            "assistant_turns 'edit', or give one answer a line"
        )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [span for i, span in zip(answers, encoded.unedited_spans, strict=True) if i > 0]
    cut = spans[-1][1]
    token_ids = encoded.token_ids[:cut]
    mask = prompt_edit_mask(EncodedPrompt(token_ids, encoded.unedited_spans), adapter)
    loss_mask = np.zeros(cut, bool)
    for start, end in spans:
        loss_mask[start:end] = True
    start = spans[-1][0]
    return Example(
        np.asarray(token_ids, np.int32), mask, loss_mask,
        EncodedPrompt(token_ids[:start], tuple(span for span in encoded.unedited_spans if span[1] <= start)),
        token_ids[start:], line,
    )  # fmt: skip


def _example(prompt: EncodedPrompt, answer: Sequence[int], adapter: AdapterConfig, line: int) -> Example:
    mask = extend_edit_mask(prompt_edit_mask(prompt, adapter), len(answer), adapter.positions)
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
