"""What an adapter thinks of given answers: the log-probability of each of their tokens, and the perplexity.

A prompt-only adapter edits the prompt and leaves the answer as it is, as it does when it serves and learns: an answer
that is scored as part of a prompt is scored by another model.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from preft_jax.adapters.adapter import Adapter, fold
from preft_jax.adapters.edit_mask import sequence_edit_mask
from preft_jax.config import ModelConfig
from preft_jax.errors import AdapterError, ModelError, RequestError, check_type, shown
from preft_jax.loading import Model, check_base, check_whole
from preft_jax.models.batch import bucket
from preft_jax.models.forward import edits_of, hidden_states
from preft_jax.models.logprobs import token_logprobs
from preft_jax.models.params import Params
from preft_jax.prompts import as_list, is_one, per_prompt
from preft_jax.rows import collate
from preft_jax.text.chat import EncodedPrompt, encode_answer, encode_prompt
from preft_jax.text.encoding import encode_after

Example = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids, edit mask, and which tokens are the answer's."""


def logprobs(
    model: Model,
    prompts: Any,
    answers: Any,
    adapters: Any = None,
    *,
    edit_masks: Any = None,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Return the raw log-probability of each token of given answers, each behind its prompt.

        logprobs(model, ["The capital of France is"], [" Paris."], adapters=adapter)

    Args:
        model: from ``load_model``.
        prompts: one or many, as ``generate`` takes them: text, token ids or chat messages.
        answers: one for each prompt: text or token ids, taken as they are. Behind chat messages a text becomes the
            assistant's message, through its end of turn.
        adapters: one ``Adapter`` for all, or a list with one (or None, the base model) for each prompt. It edits what
            it edits when it serves: the prompt, and the answer if it edits every token.
        edit_masks: a list with one mask for each prompt (or None: what its adapter's rule says): bool ``[P]``.
        batch_size: sequences that are computed together.

    Returns:
        Float32 ``[n]`` for each answer of ``n`` tokens, temperature 1.

    Raises:
        RequestError: for a prompt or an answer that is empty, too long or of another kind, or wrong counts.
        AdapterError: for an adapter of another base model.
        ModelError: if ``model`` is no ``Model``.
    """
    check_type("model", model, Model, "what load_model returns", ModelError)
    check_whole(model)
    single = is_one(prompts) if isinstance(prompts, str | Sequence) or hasattr(prompts, "__array__") else True
    prompts = as_list(prompts)
    answers = [answers] if single and is_one(answers) else as_list(answers, "answers")
    count = len(prompts)
    if len(answers) != count:
        raise RequestError(f"answers has {len(answers)} entries for {count} prompts; give one for each")
    owners = per_prompt(adapters, count, "adapters")
    masks = per_prompt(edit_masks, count, "edit_masks")
    checked: dict[int, Adapter] = {}
    for adapter in owners:
        if adapter is not None and id(adapter) not in checked:
            _check_adapter(adapter, model)
            checked[id(adapter)] = adapter
    examples = [_example(model, *each) for each in zip(prompts, answers, owners, masks, strict=True)]
    scores: list[Any] = [None] * count
    for key in dict.fromkeys(map(id, owners)):
        own = sorted((i for i in range(count) if id(owners[i]) == key), key=lambda i: len(examples[i][0]))
        for at in range(0, len(own), batch_size):
            some = own[at : at + batch_size]
            found = _batch(model, owners[some[0]], [examples[i] for i in some])
            scores = [found[some.index(i)] if i in some else score for i, score in enumerate(scores)]
    return scores


def perplexity(model: Model, prompts: Any, answers: Any, adapters: Any = None, **options: Any) -> float:
    """Return the perplexity of given answers: ``exp`` of the negative mean of ``logprobs`` over all of their tokens.

    Arguments and errors are those of ``logprobs``.
    """
    scores = logprobs(model, prompts, answers, adapters, **options)
    if not scores:
        raise RequestError("there are no prompts; give at least one")
    return math.exp(-float(np.concatenate(scores).mean(dtype=np.float64)))


def _check_adapter(adapter: Any, model: Model) -> None:
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"adapters holds {shown(adapter)}; give an Adapter (load_adapter makes one), or None")
    check_base(adapter, model)


def _example(model: Model, prompt: Any, answer: Any, adapter: Adapter | None, mask: Any) -> Example:
    encoded, answer_ids = _encode(model, prompt, answer)
    if not answer_ids:
        raise RequestError("the answer is empty; give at least one token")
    if outside := [token for token in answer_ids if not 0 <= token < model.config.vocab_size]:
        raise RequestError(
            f"token id {outside[0]} of the answer is outside the model's vocabulary; allowed: 0 to "
            f"{model.config.vocab_size - 1}"
        )
    config = None if adapter is None else adapter.config
    length, prefix = len(encoded.token_ids) + len(answer_ids), 0 if config is None else config.prefix_length
    if prefix + length > model.config.max_position_embeddings:
        behind = f" behind a learned prefix of {prefix}" if prefix else ""
        raise RequestError(
            f"a prompt with its answer has {length} tokens{behind}; the model has "
            f"{model.config.max_position_embeddings} positions"
        )
    edited = sequence_edit_mask(encoded, config, len(answer_ids), own=mask)
    is_answer = np.arange(length) >= len(encoded.token_ids)
    return np.asarray([*encoded.token_ids, *answer_ids], np.int32), edited, is_answer


def _encode(model: Model, prompt: Any, answer: Any) -> tuple[EncodedPrompt, list[int]]:
    vocab_size, is_text = model.config.vocab_size, isinstance(answer, str)
    if is_text and _is_chat(prompt):
        return encode_answer(model.tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    if isinstance(prompt, EncodedPrompt):
        encoded = prompt
    else:
        encoded = encode_prompt(model.tokenizer, prompt, vocab_size=vocab_size)
    if not is_text:
        return encoded, encode_prompt(None, answer, vocab_size=vocab_size).token_ids
    if model.tokenizer is None:
        raise RequestError("this model has no tokenizer; give the answer as token ids")
    return encoded, encode_after(model.tokenizer, prompt if isinstance(prompt, str) else "", answer)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _batch(model: Model, adapter: Adapter | None, examples: Sequence[Example]) -> list[np.ndarray]:
    rows = collate([*examples, *[examples[0]] * (bucket(len(examples)) - len(examples))])
    found = _score(model.config, model.params, None if adapter is None else fold(adapter), rows)
    scores = np.asarray(found)
    return [
        scores[b, len(is_answer) - 1 - int(is_answer.sum()) : len(is_answer) - 1]
        for b, (_, _, is_answer) in enumerate(examples)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _score(config: ModelConfig, params: Params, folded: Any, rows: Any) -> jax.Array:
    """Return the log-probability of each token's successor, ``[B, S]``; 0 where it is not an answer's."""
    edits = edits_of(config, folded, None if folded is None else rows.edit_mask_BSG)
    h_BSD = hidden_states(config, params, rows.tokens_BS, edits)
    flat = h_BSD.reshape(-1, h_BSD.shape[2]), rows.targets_BS.reshape(-1), rows.weights_BS.reshape(-1) > 0
    return token_logprobs(params, *flat).reshape(rows.tokens_BS.shape)
