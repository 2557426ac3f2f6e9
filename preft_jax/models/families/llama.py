"""Llama 2 and 3.x, and models of their shape, SmolLM2 among them."""

from preft_jax.models.family import LLAMA_WINDOW, REFUSED, Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    refused={**REFUSED, "sliding_window": LLAMA_WINDOW},
    gguf_architecture="llama",
    gguf_permuted=True,
)
