"""Mistral 7B and models of its shape: attention sees the last ``sliding_window`` keys, all where that is null."""

from preft_jax.models.family import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read={"sliding_window": 4096},
    gguf_architecture=None,  # Its files say llama.
)
