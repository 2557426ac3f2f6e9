"""Documents: token sequences to learn from, with a weight for each token and what losses other than SFT's need."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.adapters.edit_mask import sequence_edit_mask
from preft_jax.errors import PreftError
from preft_jax.shapes import NUM_GROUPS
from preft_jax.text.chat import EncodedPrompt

OPTIONAL_FIELDS = ("old_logprobs", "advantages", "ref_logprobs")
"""What a document holds for some losses only."""


class DocumentError(PreftError, ValueError):
    """A document that cannot be trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """A sequence of S tokens. What an array says at t is of token t, given those before it; so its first entry is moot.

    ``train.data.rows.Example`` is the simple case: weights are 0 or 1, and there is nothing else.

    Attributes:
        token_ids: int32 ``[S]``.
        edit_mask: bool ``[S, NUM_GROUPS]``, which tokens the adapter edits (``preft_jax.adapters.edit_mask``).
        weights: float32 ``[S]``, at least 0: the part of each token in the loss; 0 where it is not learned.
        old_logprobs: float32 ``[S]`` under the distribution that tokens were sampled from, or None.
        advantages: float32 ``[S]``, or None.
        ref_logprobs: float32 ``[S]`` under a reference policy, of which a loss stays near; or None.
        temperature: of the distribution whose log-probabilities losses are given: logits are divided by it.

    Raises:
        DocumentError: if an array has another shape, or holds what it may not.
    """

    token_ids: np.ndarray
    edit_mask: np.ndarray
    weights: np.ndarray
    old_logprobs: np.ndarray | None = None
    advantages: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        expected = {"token_ids": (count,), "edit_mask": (count, NUM_GROUPS)}
        for name in ("token_ids", "edit_mask", "weights", *OPTIONAL_FIELDS):
            array, shape = getattr(self, name), expected.get(name, (count,))
            if array is not None and np.shape(array) != shape:
                raise DocumentError(
                    f"{name} has shape {list(np.shape(array))}, expected {list(shape)}: one entry for each of the "
                    f"{count} tokens"
                )
        if count == 0:
            raise DocumentError("the document is empty; give at least one token")
        weights = np.asarray(self.weights)
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise DocumentError(
                f"weights go from {weights.min():g} to {weights.max():g}; give finite numbers of at least 0 (what "
                "is to become less likely has a negative advantage)"
            )
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise DocumentError(f"temperature is {self.temperature:g}; give a finite number above 0")
        learned = weights > 0
        for name in OPTIONAL_FIELDS:
            array = getattr(self, name)
            if array is not None and not np.isfinite(np.asarray(array)[learned]).all():
                raise DocumentError(f"{name} are not finite at a token that is learned; give it the weight 0")

    def __len__(self) -> int:
        return len(self.token_ids)


def sampled_document(
    prompt: EncodedPrompt,
    answer: Sequence[int],
    config: AdapterConfig,
    *,
    logprobs: Sequence[float],
    advantage: float,
    weight: float = 1.0,
) -> Document:
    """Return a prompt and an answer that was sampled for it, to learn the answer by its advantage.

    Args:
        prompt: as the engine was given it.
        answer: token ids of a sample.
        config: of the adapter; says which tokens are edited, as it does in the engine.
        logprobs: of the answer's tokens under the distribution that they were sampled from (``sampling_logprobs``).
        advantage: of the answer, for each of its tokens.
        weight: of each of its tokens: 1, or 1 over their number if every answer is to count the same.

    Raises:
        DocumentError: as ``Document``.
    """
    if len(logprobs) != len(answer):
        raise DocumentError(f"logprobs has {len(logprobs)} entries, and the answer {len(answer)} tokens; give one each")
    before = np.zeros(len(prompt.token_ids), np.float32)

    def of_answer(values: Sequence[float]) -> np.ndarray:
        return np.concatenate([before, np.asarray(values, np.float32)])

    return Document(
        token_ids=np.asarray([*prompt.token_ids, *answer], np.int32),
        edit_mask=sequence_edit_mask(prompt, config, len(answer)),
        weights=of_answer([weight] * len(answer)),
        old_logprobs=of_answer(logprobs),
        advantages=of_answer([advantage] * len(answer)),
    )
