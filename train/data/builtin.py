"""The task that is trained without a dataset: a spoken wish becomes a command in JSON.

A small instruction-tuned model talks about the wish; after some minutes of training on a CPU it answers with the
command alone. Every sentence is drawn from the seed, and those held out share no wish with the ones to train on.
"""

import json
from typing import Any

import numpy as np

_DEVICES = ("lamp", "heater", "fan", "radio", "kettle", "camera", "blinds", "speaker")
_ROOMS = ("kitchen", "bedroom", "garage", "hall", "office", "garden", "attic", "cellar")
_STATES = ("on", "off")
_FORMS = (
    "Turn {state} the {device} in the {room}.",
    "Please switch the {device} in the {room} {state}.",
    "Could you turn the {room} {device} {state}?",
    "I'd like the {device} in the {room} to be {state}.",
    "The {device}, the one in the {room}: {state}, please!",
)

NAME = "built-in task: wishes to commands"


def rows(seed: int = 0, *, train: int = 128, held_out: int = 32) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train on and rows held out, in the form of a dataset's lines."""
    rng = np.random.default_rng(seed)
    wishes = [(device, room, state) for device in _DEVICES for room in _ROOMS for state in _STATES]
    wishes = [wishes[i] for i in rng.permutation(len(wishes))]
    return _draw(rng, wishes[held_out:], train), _draw(rng, wishes[:held_out], held_out)


def _draw(rng: np.random.Generator, wishes: list[tuple[str, str, str]], count: int) -> list[dict[str, Any]]:
    drawn = []
    for i in range(count):
        device, room, state = wishes[i % len(wishes)]
        form = _FORMS[rng.integers(len(_FORMS))]
        answer = json.dumps({"device": device, "room": room, "set": state})
        drawn.append(
            {
                "messages": [
                    {"role": "user", "content": form.format(device=device, room=room, state=state)},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return drawn
