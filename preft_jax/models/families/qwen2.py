"""Qwen2 and Qwen2.5: q, k and v have biases, whatever ``attention_bias`` says."""

from preft_jax.models.family import REFUSED, Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    refused={field: message for field, message in REFUSED.items() if field != "attention_bias"},
    gguf_architecture="qwen2",
)
