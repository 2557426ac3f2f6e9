import jax
import jax.numpy as jnp
import numpy as np
import pytest

from preft_jax.models import logprobs
from preft_jax.models.linear import Transposed

D, V = 12, 40


def heads(rng):
    """Return the output head in every layout: tied, plain, transposed."""
    embed = rng.standard_normal((V, D)).astype(np.float32)
    own = rng.standard_normal((D, V)).astype(np.float32)
    return {
        "tied": ({"embed": embed}, embed.T),
        "plain": ({"embed": embed, "lm_head": own}, own),
        "transposed": ({"embed": embed, "lm_head": Transposed(own.T)}, own),
    }


def plain_logprobs(head_DV, h_TD, targets_T, learned_T):
    return jnp.where(learned_T, jax.nn.log_softmax(h_TD @ head_DV)[jnp.arange(len(targets_T)), targets_T], 0.0)


@pytest.mark.parametrize("layout", ["tied", "plain", "transposed"])
@pytest.mark.parametrize("tokens", [1, 24, 64])
def test_logprobs_and_their_gradients_are_the_plain_ones(layout, tokens, rng, monkeypatch):
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * V * 8)
    params, head_DV = heads(rng)[layout]
    h_TD = rng.standard_normal((tokens, D)).astype(np.float32)
    targets_T = rng.integers(0, V, tokens).astype(np.int32)
    learned_T = rng.random(tokens) < 0.6
    cotangent_T = rng.standard_normal(tokens).astype(np.float32)

    def logprob(h_TD):
        return logprobs.token_logprobs(params, h_TD, targets_T, learned_T)

    found, back = jax.vjp(logprob, h_TD)
    expected, plain_back = jax.vjp(lambda h_TD: plain_logprobs(head_DV, h_TD, targets_T, learned_T), h_TD)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(back(cotangent_T)[0], plain_back(cotangent_T)[0], atol=1e-5)
    np.testing.assert_allclose(logprob(h_TD), expected, atol=1e-5)


def test_the_logits_of_all_tokens_never_exist(rng, monkeypatch):
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * V * 8)
    params = {"embed": rng.standard_normal((V, D)).astype(np.float32)}
    tokens = 256

    def total(h_TD):
        return logprobs.token_logprobs(params, h_TD, jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool)).sum()

    text = str(jax.make_jaxpr(jax.value_and_grad(total))(jnp.zeros((tokens, D))))
    assert f"[8,{V}]" in text
    assert f"[{tokens},{V}]" not in text


def test_what_is_not_learned_does_not_spoil_what_is(rng):
    """A token that is not learned may have any logits and any cotangent, also in the chunk of one that is."""
    params = {"embed": rng.standard_normal((V, D)).astype(np.float32)}
    h_TD = rng.standard_normal((2, D)).astype(np.float32)
    targets_T, learned_T = np.zeros(2, np.int32), np.array([True, False])

    def logprob(h_TD):
        return logprobs.token_logprobs(params, h_TD, targets_T, learned_T)

    expected, back = jax.vjp(logprob, h_TD)
    h_TD[1] = np.inf
    found, spoilt = jax.vjp(logprob, h_TD)
    assert found.tolist() == [expected[0], 0.0]
    (slope,) = back(np.ones(2, np.float32))
    np.testing.assert_array_equal(spoilt(np.array([1, np.nan], np.float32))[0], slope)


@pytest.mark.parametrize(("tokens", "vocab"), [(8192, 128256), (512, 49152), (96, 512), (7, 32)])
def test_chunks_divide_the_tokens_and_stay_small(tokens, vocab):
    size = logprobs.chunk_size(tokens, vocab)
    assert tokens % size == 0
    assert size == 1 or size * vocab * 4 <= 1 << 28
