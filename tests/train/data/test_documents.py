"""Documents: what is refused, what a sample becomes, and how they are packed."""

import dataclasses

import numpy as np
import pytest

from preft_jax.adapters.config import AdapterConfig
from preft_jax.text.chat import EncodedPrompt
from train.data.batches import Rows, collate
from train.data.documents import OPTIONAL_FIELDS, Document, DocumentError, sampled_document

CONFIG = AdapterConfig(kind="lora", rank=4)


@pytest.fixture
def document(rng):
    tokens = rng.integers(0, 250, 7).astype(np.int32)
    mask = np.zeros((7, 2), bool)
    mask[:4, 0] = True
    fields = {name: rng.standard_normal(7).astype(np.float32) for name in OPTIONAL_FIELDS}
    weights = np.where(np.arange(7) >= 4, rng.random(7), 0).astype(np.float32)
    return Document(token_ids=tokens, edit_mask=mask, weights=weights, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": np.ones(6)}, r"weights has shape \[6\], expected \[7\]"),
        ({"edit_mask": np.ones(7, bool)}, r"edit_mask has shape \[7\], expected \[7, 2\]"),
        ({"advantages": 1.0}, r"advantages has shape \[\]"),
        ({"weights": -np.ones(7)}, "weights go from -1 to -1"),
        ({"weights": np.full(7, np.nan)}, "weights go from nan"),
        ({"old_logprobs": np.full(7, -np.inf)}, "old_logprobs are not finite"),
    ],
)
def test_documents_that_cannot_be_learned_are_refused(fields, message, document):
    with pytest.raises(DocumentError, match=message):
        dataclasses.replace(document, **fields)


def test_what_is_not_learned_may_have_no_logprob(document):
    logprobs = np.where(document.weights > 0, -1.0, -np.inf)
    assert dataclasses.replace(document, old_logprobs=logprobs).old_logprobs is logprobs


def test_a_sample_is_learned_where_it_was_drawn():
    prompt = EncodedPrompt([5, 6, 7], ())
    made = sampled_document(prompt, [8, 9], CONFIG, logprobs=[-0.5, -2.0], advantage=-1.5, weight=0.5)
    assert made.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert made.edit_mask[:, 0].tolist() == [True] * 3 + [False] * 2
    assert made.weights.tolist() == [0, 0, 0, 0.5, 0.5]
    assert made.old_logprobs.tolist() == [0, 0, 0, -0.5, -2]
    assert made.advantages.tolist() == [0, 0, 0, -1.5, -1.5]
    with pytest.raises(DocumentError, match="logprobs has 1 entries, and the answer 2 tokens"):
        sampled_document(prompt, [8, 9], CONFIG, logprobs=[-0.5], advantage=1.0)


def test_a_batch_has_what_the_loss_needs_beside_the_targets(document):
    row = [document, document]
    batch = collate([Rows([row], 0, 0, 0)], num_rows=2, max_length=32, packed=True, fields=("advantages",))
    assert batch.old_logprobs_BS is None
    for found, values in ((batch.weights_BS, document.weights), (batch.advantages_BS, document.advantages)):
        expected = np.zeros((2, 32), np.float32)
        expected[0, :6] = expected[0, 7:13] = values[1:]
        np.testing.assert_array_equal(found, expected)
