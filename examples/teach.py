"""Fine-tune a prefill-only adapter in one short loop, and see what it does: the whole of it, on the library's parts.

    python examples/teach.py

The adapter edits prompt tokens only. The loss is on the answer, so the gradient comes to the adapter through the keys
and values of the prompt that the answer attends to. ``python -m train.sft`` does the same with everything that a long
run wants: packing, many adapters at once, checkpoints, evaluation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import preft_jax
from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.edit_mask import extend_edit_mask, make_edit_mask
from preft_jax.adapters.fold import fold_params
from preft_jax.models.forward import forward
from preft_jax.text.chat import encode_answer

STEPS, BATCH, LEARNING_RATE = 24, 8, 2e-3

ANIMALS = {"dog": "barks", "cat": "meows", "cow": "moos", "owl": "hoots", "bee": "buzzes", "lion": "roars"}
FORMS = ("What does the {} do?", "Tell me what a {} does.", "A {}: what does it do?", "And the {}?")


def rows():
    """Return questions with answers that no model would give by itself."""
    return [
        ([{"role": "user", "content": form.format(animal)}, {"role": "assistant", "content": f"[{animal}] {does}!"}])
        for animal, does in ANIMALS.items()
        for form in FORMS
    ]


def encode(model, config, messages):
    """Return tokens, edit mask and loss mask of one chat."""
    prompt, answer = encode_answer(model.tokenizer, messages)
    edited = extend_edit_mask(make_edit_mask(len(prompt.token_ids), config.positions), len(answer), config.positions)
    learned = np.arange(len(edited)) >= len(prompt.token_ids)
    return np.array([*prompt.token_ids, *answer]), edited, learned


def collate(examples):
    """Pad examples to one length: tokens ``[B, S]``, edit masks ``[B, S, 2]``, weights ``[B, S]`` of the next token."""
    size = -(-max(len(tokens) for tokens, _, _ in examples) // 16) * 16
    tokens = np.zeros((len(examples), size), np.int32)
    edited = np.zeros((len(examples), size, 2), bool)
    weights = np.zeros((len(examples), size), np.float32)
    for i, (own, mask, learned) in enumerate(examples):
        tokens[i, : len(own)], edited[i, : len(own)] = own, mask
        weights[i, : len(own) - 1] = learned[1:]
    return tokens, edited, weights


def loss(config, adapter_config, params, adapter, tokens, edited, weights):
    """Return the mean cross-entropy of the answers' tokens; differentiated in ``adapter`` alone."""
    logits = forward(
        config, params, tokens, folded=fold_params(adapter_config, adapter), edit_mask_BSG=edited
    )  # fmt: skip
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, axis=1))
    return (nll * weights).sum() / weights.sum()


def main():
    """Train, then ask base model and adapter the same questions."""
    model = preft_jax.load_model("smollm2-135m")
    config = preft_jax.AdapterConfig(kind="lora", rank=8, base_model_digest=model.digest)
    adapter = preft_jax.init_adapter(config, model.config, jax.random.key(0)).params
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, 3, STEPS), weight_decay=0.0)
    state = optimizer.init(adapter)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(params, adapter, state, batch):
        value, grads = jax.value_and_grad(loss, argnums=3)(model.config, config, params, adapter, *batch)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    examples = [encode(model, config, messages) for messages in rows()]
    rng = np.random.default_rng(0)
    for number in range(STEPS):
        batch = collate([examples[i] for i in rng.choice(len(examples), BATCH, replace=False)])
        adapter, state, value = step(model.params, adapter, state, batch)
        print(f"step {number + 1:3}  loss {float(value):.4f}")

    trained = Adapter(config, jax.tree.map(np.asarray, adapter))
    for animal in ("owl", "horse"):
        question = [{"role": "user", "content": f"Please say what the {animal} does."}]
        base, own = (
            preft_jax.generate(
                model, [question], adapters=one, max_tokens=16, sampling=preft_jax.SamplingParams(temperature=0.0)
            )
            for one in (None, trained)
        )
        print(f"{question[0]['content']}\n  base:    {base[0].text!r}\n  adapter: {own[0].text!r}")
    return trained


if __name__ == "__main__":
    main()
