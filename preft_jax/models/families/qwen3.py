"""Qwen3: the heads of q and k are normed before they are rotated."""

from preft_jax.models.family import Family

FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True, gguf_architecture="qwen3")
