"""Which tokens an adapter edits: the only place that decides it.

A request's edit mask is made once, when the request is admitted, from the adapter's position rule, the prompt's length
and the spans that the chat renderer reports as un-edited. Everything after that (chunking, preemption, speculation)
slices or extends the mask and never derives it again: whether a step is a prefill is never the question.

Rules:

``prompt``
    Every prompt token, the last one included; no generated token. The default.
``f{n}+l{m}``
    The first ``min(n, P // 2)`` and the last ``min(m, P // 2)`` of ``P`` prompt tokens (pyreft's notation); ``f{n}`` or
    ``l{m}`` alone are allowed.
``all``
    Every token, generated ones too: ordinary, all-token adapters.
A registered name
    What its function says of the prompt's tokens (``positions.register_positions``); no generated token.

A mask of one's own, in place of a rule's, is given to a request or a training document.

A mask has ``NUM_GROUPS`` columns. Adapters with shared weights edit through column 0 only; adapters with their own
weights for first and last positions (pyreft without ``share_weights``) use column 0 for the first and column 1 for the
last.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.positions import RuleFunction, parse_positions
from preft_jax.errors import RequestError, ShapeError, check_type, plain
from preft_jax.shapes import NUM_GROUPS, check_axes
from preft_jax.text.chat import EncodedPrompt


def make_edit_mask(
    prompt_len: int,
    positions: str,
    *,
    token_ids: Sequence[int] | None = None,
    groups: int = 1,
    unedited_spans: Sequence[tuple[int, int]] = (),
) -> np.ndarray:
    """Return the edit mask of a prompt.

    Args:
        prompt_len: number of prompt tokens, at least 1.
        positions: the adapter's rule, see the module's text.
        token_ids: of the prompt; needed for registered rules.
        groups: 1 for shared weights; 2 if first and last positions have their own.
        unedited_spans: half-open token spans that stay un-edited (earlier assistant turns of a ``skip`` adapter).

    Returns:
        bool ``[prompt_len, NUM_GROUPS]``.

    Raises:
        RequestError: for an empty prompt, spans outside it, or a rule whose function fails.
    """
    if prompt_len < 1:
        raise RequestError("the prompt is empty; give at least one token")
    rule = parse_positions(positions)
    mask_TG = np.zeros((prompt_len, NUM_GROUPS), bool)
    if rule.function is not None:
        mask_TG[:] = _by_function(rule.function, positions, prompt_len, token_ids, groups)
    elif rule.first is None or rule.last is None:
        mask_TG[:, 0] = True
    else:
        half = prompt_len // 2
        mask_TG[: min(rule.first, half), 0] = True
        mask_TG[prompt_len - min(rule.last, half) :, groups - 1] = True
    for start, end in unedited_spans:
        if not 0 <= start <= end <= prompt_len:
            raise RequestError(f"un-edited span ({start}, {end}) lies outside the prompt of {prompt_len} tokens")
        mask_TG[start:end] = False
    return mask_TG


def _by_function(
    function: RuleFunction, positions: str, prompt_len: int, token_ids: Sequence[int] | None, groups: int
) -> np.ndarray:
    if token_ids is None:
        raise RequestError(f"positions {positions!r} looks at the prompt's tokens; give token_ids")
    try:
        mask = np.asarray(function(np.asarray(token_ids, np.int32), prompt_len))
    except Exception as error:
        raise RequestError(f"the rule {positions!r} failed: {type(error).__name__}: {plain(str(error))}") from error
    return own_mask(mask, prompt_len, f"the mask of the rule {positions!r}", groups)


def own_mask(mask: Any, prompt_len: int, name: str, groups: int) -> np.ndarray:
    """Return a mask of somebody's own as bool ``[prompt_len, NUM_GROUPS]``; one without groups is of group 0.

    Raises:
        RequestError: if it has other axes, is not bool, or marks tokens for a group beyond the adapter's ``groups``.
    """
    mask = np.asarray(mask)
    try:
        if mask.ndim == 1:
            check_axes(name, mask, "bool", P=prompt_len)
            return np.stack([mask, np.zeros_like(mask)], axis=1)
        check_axes(name, mask, "bool", P=prompt_len, G=NUM_GROUPS)
    except ShapeError as error:
        raise RequestError(str(error)) from None
    if mask[:, groups:].any():
        raise RequestError(
            f"{name} marks tokens in column 1, which is for the last positions of adapters with share_weights false; "
            "this adapter reads column 0 alone"
        )
    return mask.copy()


def extend_edit_mask(mask_TG: np.ndarray, num_generated: int, positions: str) -> np.ndarray:
    """Return ``mask_TG`` followed by the rows of ``num_generated`` generated tokens.

    Generated tokens are never edited, except by an all-token adapter.

    Raises:
        ShapeError: if ``mask_TG`` is not bool ``[T, NUM_GROUPS]``.
    """
    check_axes("mask_TG", mask_TG, "bool", T=None, G=NUM_GROUPS)
    tail_TG = np.zeros((num_generated, NUM_GROUPS), bool)
    tail_TG[:, 0] = parse_positions(positions).edits_generated
    return np.concatenate([mask_TG, tail_TG])


def prompt_edit_mask(prompt: EncodedPrompt, config: AdapterConfig | None) -> np.ndarray:
    """Return the edit mask of a prompt under an adapter, bool ``[P, NUM_GROUPS]``.

    It is all false for the base model, ``None``.

    Raises:
        RequestError: if the prompt is not what ``encode_prompt`` returns, or the adapter skips earlier answers and the
            chat template does not say where they are.
    """
    check_type("prompt", prompt, EncodedPrompt, "what encode_prompt returns", RequestError)
    count = len(prompt.token_ids)
    if config is None:
        return np.zeros_like(make_edit_mask(count, "prompt"))
    spans: tuple[tuple[int, int], ...] = ()
    if config.assistant_turns == "skip" and config.prefill_only:
        if prompt.unedited_spans is None:
            raise RequestError(
                "the adapter leaves earlier answers un-edited (assistant_turns 'skip'), but this chat template renders "
                "them differently in later turns, so their tokens cannot be told; use assistant_turns 'edit'"
            )
        spans = prompt.unedited_spans
    return make_edit_mask(
        count, config.positions, token_ids=prompt.token_ids, groups=config.groups, unedited_spans=spans
    )
