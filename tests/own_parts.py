"""A kind, a position rule and a loss of one's own: all that each takes."""

import jax.numpy as jnp
import numpy as np

import preft_jax as pj
import train

NEWLINE = 10


def shapes(config, d, f, rank):
    return {"down": (d, rank), "gate": (rank,), "up": (rank, f)}


def init(config, shapes, rng):
    down = rng.standard_normal(shapes["down"]) * shapes["down"][0] ** -0.5
    return {"down": down, "gate": np.ones(shapes["gate"]), "up": np.zeros(shapes["up"])}


def fold(config, leaves, scale):
    return jnp.tanh(leaves["down"]), leaves["gate"] - 1.0, scale * leaves["gate"][:, None] * leaves["up"]


def after_the_last_newline(token_ids, prompt_len):
    return np.arange(prompt_len) > max(np.flatnonzero(token_ids == NEWLINE), default=-1)


def focal(logprob_T, inputs):
    miss_T = 1 - jnp.exp(logprob_T)
    return -(miss_T**2) * logprob_T, {"miss": miss_T}


def register():
    pj.register_kind("gated", shapes, init, fold, targets=("q", "v", "block"), scaled=True, replace=True)
    pj.register_positions("after-newline", after_the_last_newline, replace=True)
    train.register_loss("own-focal", focal, replace=True)
