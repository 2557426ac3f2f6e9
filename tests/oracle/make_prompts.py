"""Write ``prompts.json``: the texts and prompts that the SmolLM2 fixtures are made for, with our tokenizer's token ids.

    python tests/oracle/make_prompts.py --output tests/fixtures/smollm2

Runs where preft_jax is installed, before ``make_model_fixtures.py``, which runs beside torch and reads the ids.

    {"texts":  [{"text": str, "token_ids": [int]}],                     4 short texts, for logits
     "greedy": [{"prompt": str or [messages], "token_ids": [int]}]}     20 prompts, raw and chat, for continuations
"""

import argparse
import json
from pathlib import Path

from preft_jax import load_model
from preft_jax.text.chat import encode_prompt

TEXTS = (
    "The capital of France is Paris, and the capital of Spain is",
    "def add(a, b):\n    return a + b\n",
    "In 1969, 2 people walked on the Moon.",
    "Größe, naïveté, 東京 and 🙂 are not ASCII.",
)

RAW = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colors are",
    "1, 2, 3, 4, 5, 6,",
    "Dear Sir or Madam,\n\nI am writing to",
    "To make a good cup of tea, first",
    "The mitochondria is",
    "La capitale de l'Italie est",
)

CHATS = (
    ("What is the capital of France?",),
    ("Write one sentence about the sea.",),
    ("What is 12 + 7?",),
    ("Name three fruits.",),
    ("Translate 'good morning' to Spanish.",),
    ("Explain gravity to a child in one sentence.",),
    ("Give me a short title for a story about a lost dog.",),
    ("Hi!", "Hello! How can I help you today?", "Tell me a joke."),
    ("What is the largest planet?", "Jupiter is the largest planet.", "And the smallest?"),
    ("My name is Ada.", "Nice to meet you, Ada!", "What is my name?"),
)


def main() -> None:
    """Tokenise the prompts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    model = load_model("smollm2-135m")

    def ids(prompt: str | list[dict[str, str]]) -> list[int]:
        return encode_prompt(model.tokenizer, prompt, vocab_size=model.config.vocab_size).token_ids

    chats = [
        [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
        for turns in CHATS
    ]
    content = {
        "texts": [{"text": text, "token_ids": ids(text)} for text in TEXTS],
        "greedy": [{"prompt": prompt, "token_ids": ids(prompt)} for prompt in (*RAW, *chats)],
    }
    output.mkdir(parents=True, exist_ok=True)
    parts = (
        f"{json.dumps(key)}: [\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in entries) + "\n]"
        for key, entries in content.items()
    )
    (output / "prompts.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
