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

A marker (``AdapterConfig.alora_invocation_tokens``) narrows ``prompt`` and ``all``: only tokens from its last place in
the prompt on are edited, its own tokens included. Of a prompt that does not hold it nothing is edited, and nothing of
what is generated behind it (as PEFT's activated LoRA has it). The marker is looked for in the prompt alone, never in
what is generated.

A learned prefix edits no token, and every token sees it, generated ones too: its mask is true everywhere.

A mask of one's own, in place of a rule's, is given to a request or a training document.

A mask has ``NUM_GROUPS`` columns. Adapters with shared weights edit through column 0 only; adapters with their own
weights for first and last positions (pyreft without ``share_weights``) use column 0 for the first and column 1 for the
last.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.positions import RuleFunction, marker_start, parse_positions
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
    marker: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the edit mask of a prompt.

    Args:
        prompt_len: number of prompt tokens, at least 1.
        positions: the adapter's rule, see the module's text.
        token_ids: of the prompt; needed for registered rules and a marker.
        groups: 1 for shared weights; 2 if first and last positions have their own.
        unedited_spans: half-open token spans that stay un-edited (earlier assistant turns of a ``skip`` adapter).
        marker: token ids from whose last place on tokens are edited; None: from the first token on.

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
    if marker is not None:
        start = marker_start(_ids_for("a marker", token_ids), marker)
        mask_TG[: prompt_len if start is None else start] = False
    for start, end in unedited_spans:
        if not 0 <= start <= end <= prompt_len:
            raise RequestError(f"un-edited span ({start}, {end}) lies outside the prompt of {prompt_len} tokens")
        mask_TG[start:end] = False
    return mask_TG


def _by_function(
    function: RuleFunction, positions: str, prompt_len: int, token_ids: Sequence[int] | None, groups: int
) -> np.ndarray:
    ids_P = np.asarray(_ids_for(f"positions {positions!r}", token_ids), np.int32)
    try:
        mask = np.asarray(function(ids_P, prompt_len))
    except Exception as error:
        raise RequestError(f"the rule {positions!r} failed: {type(error).__name__}: {plain(str(error))}") from error
    return own_mask(mask, prompt_len, f"the mask of the rule {positions!r}", groups)


def _ids_for(what: str, token_ids: Sequence[int] | None) -> Sequence[int]:
    if token_ids is None:
        raise RequestError(f"{what} looks at the prompt's tokens; give token_ids")
    return token_ids


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

    Generated tokens are never edited, except by an all-token adapter. ``sequence_edit_mask`` knows of markers, too.

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
        count, config.positions, token_ids=prompt.token_ids, groups=config.groups, unedited_spans=spans,
        marker=config.alora_invocation_tokens,
    )  # fmt: skip


def sequence_edit_mask(
    prompt: EncodedPrompt, config: AdapterConfig | None, num_generated: int, *, own: Any = None
) -> np.ndarray:
    """Return the edit mask of a prompt and of what is generated behind it, bool ``[P + num_generated, NUM_GROUPS]``.

    Behind a prompt without the marker that its adapter has nothing is edited.

    Args:
        prompt: what ``encode_prompt`` returns.
        config: of the adapter; None: the base model.
        num_generated: tokens that are, or may be, generated.
        own: a mask for the prompt in place of the adapter's rule, see ``own_mask``. Beside a marker it says where
            the marker stands: if it marks no token, there is none.

    Raises:
        RequestError: as ``prompt_edit_mask`` and ``own_mask``, and for a mask of one's own without an adapter.
    """
    mask_TG = prompt_edit_mask(prompt, config)
    if own is not None:
        if config is None:
            raise RequestError("edit_mask is given without an adapter, and so there is nothing to edit with")
        if config.prefix_length:
            raise RequestError("edit_mask is given, and every token sees the adapter's learned prefix; leave it out")
        mask_TG = own_mask(own, len(prompt.token_ids), "edit_mask", config.groups)
    if config is not None and config.prefix_length:
        return extend_edit_mask(mask_TG, num_generated, "all")
    unmarked = config is not None and config.alora_invocation_tokens is not None and not mask_TG.any()
    positions = "prompt" if config is None or unmarked else config.positions
    return extend_edit_mask(mask_TG, num_generated, positions)


def lacks_marker(prompt: EncodedPrompt, config: AdapterConfig | None) -> bool:
    """Whether an adapter has a marker that a prompt does not hold, so that nothing is edited."""
    marker = None if config is None else config.alora_invocation_tokens
    return marker is not None and marker_start(prompt.token_ids, marker) is None
