"""The task that needs no dataset and no package: say a word, and nothing else.

A small instruction-tuned model talks about the word. Every completion is worth something: the part of its words that
are the word that was asked for, so that there is a way up from one answer to a better one. Words that are held out are
no words to train on.
"""

import re
from typing import Any

import numpy as np

_WORDS = (
    "apple", "bell", "boat", "bread", "bridge", "brush", "button", "candle", "carpet", "castle", "chair", "cloud",
    "coin", "copper", "cotton", "desert", "dragon", "drum", "eagle", "engine", "farmer", "feather", "fire", "flag",
    "flower", "forest", "garden", "glass", "hammer", "harbor", "honey", "island", "jacket", "kettle", "king",
    "kitchen", "ladder", "lamp", "lemon", "letter", "lion", "market", "meadow", "metal", "mirror", "moon", "mountain",
    "needle", "ocean", "onion", "orange", "paper", "pencil", "pepper", "piano", "pillow", "planet", "pocket", "potato",
    "queen", "rabbit", "river", "rocket", "salt", "school", "shadow", "silver", "spider", "spring", "star", "stone",
    "summer", "sugar", "sword", "table", "teacher", "thunder", "tiger", "train", "tree", "turtle", "valley", "violin",
    "wagon", "water", "whale", "window", "winter", "wolf", "yellow",
)  # fmt: skip

_HELD_OUT = 24

_FORMS = ("Say the word {}.", "Please say {}.", "Write one word: {}", "Answer with {}.")

_SYSTEM = {"role": "system", "content": "Be brief."}

DEFAULTS = {
    "max_prompt_length": 24, "max_completion_length": 8, "max_steps": 24, "learning_rate": 2e-3,
    "num_eval_prompts": _HELD_OUT,
}  # fmt: skip
"""Options of a job that is given none: some minutes on a CPU of two cores."""

NAME = "built-in task: say the word"


def prompt(seed: int, place: int, *, held_out: bool) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Return the prompt at a place of the stream, or of those that are held out; and what its reward is given."""
    order = np.random.default_rng([seed, 0]).permutation(len(_WORDS))
    words = [_WORDS[i] for i in (order[:_HELD_OUT] if held_out else order[_HELD_OUT:])]
    epoch, index = divmod(place, len(words))
    rng = np.random.default_rng([seed, 1, int(held_out), epoch])
    word = words[rng.permutation(len(words))[index]]
    form = _FORMS[rng.integers(len(_FORMS), size=len(words))[index]]
    return [_SYSTEM, {"role": "user", "content": form.format(word)}], {"word": word}


def reward(prompt: Any, completion: str, *, word: str) -> float:
    """Return the part of a completion's words that are the word, whatever their case; 0 without any."""
    words = re.findall(r"\w+", completion.lower())
    return words.count(word) / len(words) if words else 0.0
