"""Learned prefixes that begin as real text: what the base model keeps of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.config import AdapterConfig, adapter_shapes
from preft_jax.adapters.edits import NoEdits, PrefixKV
from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from preft_jax.models.attention import DenseAttention
from preft_jax.models.forward import rope_table
from preft_jax.models.layer import hidden
from preft_jax.models.plain import PlainLayers
from preft_jax.shapes import PREFIX
from preft_jax.text.chat import encode_prompt

TEXT = (
    "Read the question with care. Work out step by step what is asked, which facts are given and which rules apply. "
    "Check each step before the next one. Then write the answer, in the form that is asked for, and nothing else.\n"
)
"""What a new prefix begins as."""


class _Keeping:
    """Attends as dense attention does, and keeps each layer's keys and values."""

    def __init__(self) -> None:
        self.kept: list[tuple[jax.Array, jax.Array]] = []

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, prefix: PrefixKV | None = None
    ) -> jax.Array:
        """See ``Attention.attend``."""
        self.kept.append((k, v))
        return DenseAttention(None).attend(layer, q, k, v, window)


def text_prefix(config: AdapterConfig, model: Model, text: str | Sequence[int] | None = None) -> Adapter:
    """Return a prefix of a text's first tokens: a request with it is answered as if the text stood before its prompt.

    Args:
        config: of a kind that has keys and values as parameters, ``prefix``; ``rank`` tokens are taken.
        model: the base model.
        text: or token ids; encoded as a prompt is, and repeated if it has too few tokens. None: a text for any task.

    Raises:
        ConfigError: if the config is of another kind, or does not fit the model.
        RequestError: if the text is empty, is no text, or is one for a model without a tokenizer.
    """
    if config.kind != "prefix":
        raise ConfigError(f"only a 'prefix' begins as a text; this adapter is {config.kind!r}: use init_adapter")
    adapter_shapes(config, model.config)  # Refuses what does not fit.
    given = TEXT if text is None else text
    encoded = encode_prompt(model.tokenizer, given, vocab_size=model.config.vocab_size).token_ids
    tokens = (encoded * -(-config.prefix_length // len(encoded)))[: config.prefix_length]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]

    def keys_and_values(params: dict, tokens_BS: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        keeping = _Keeping()
        hidden(PlainLayers(model.config, rope_table(model.config, positions), keeping, NoEdits()), params, tokens_BS)
        return keeping.kept

    kept = jax.device_get(jax.jit(keys_and_values)(model.params, jnp.asarray(tokens, jnp.int32)[None]))

    def leaf(x: np.ndarray) -> np.ndarray:
        return x[0].reshape(len(tokens), -1).astype(np.float32)

    return Adapter(config, {"layers": [{PREFIX: {"k": leaf(k), "v": leaf(v)}} for k, v in kept]})
