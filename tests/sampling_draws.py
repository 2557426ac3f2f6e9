"""Draws of many rows by one program, and what biases and penalties do to logits, in NumPy."""

import functools

import jax
import numpy as np
import reference

from preft_jax import SamplingParams
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.device import History, sample

VOCAB, ROWS, SPAN = 24, 512, 20


@functools.cache
def program():
    return jax.jit(sample)


def draw(logits, params, seeds, positions, texts=None):
    """Draw one token a row; always ``ROWS`` rows, so that one program (two, with ``texts``) serves every test."""
    rows = len(logits)
    padded = np.zeros((ROWS, VOCAB), np.float32)
    padded[:rows] = logits
    at = np.zeros(ROWS, np.int32)
    at[:rows] = positions
    history = () if texts is None else (history_of(texts),)
    drawn = program()(padded, at, sampling_arrays(list(params), list(seeds), ROWS), *history)
    return jax.tree.map(lambda array: np.asarray(array)[:rows], drawn)


def history_of(texts, rows=ROWS, span=SPAN):
    """Pack pairs of prompt and generated ids; behind each text stand ids that must not count."""
    token = np.tile(np.arange(span, dtype=np.int32) % 7, (rows, 1))
    prompt_len, length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, (prompt, generated) in enumerate(texts):
        prompt_len[row], length[row] = len(prompt), len(prompt) + len(generated)
        token[row, : length[row]] = [*prompt, *generated]
    return History(token, prompt_len, length)


def draws_of(row, params, count=ROWS, first_position=0):
    """Draw ``count`` tokens from one row of logits, at consecutive positions of one request."""
    return draw(np.tile(row, (count, 1)), [params] * count, [17] * count, np.arange(count) + first_position)


FILTERS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0, top_k=7),
    SamplingParams(top_k=1),
    SamplingParams(top_k=VOCAB + 5),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.5, top_k=10, top_p=0.8, min_p=0.15),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.5),
    SamplingParams(top_p=0.9, min_p=0.01),
]


def adjusted(row, params, text=((), ())):
    """Return one row's float64 logits with its bias and penalties, token by token as vLLM's documentation says."""
    out = reference.f64(row).copy()
    inside = range(len(out))
    prompt, generated = ([token for token in part if token in inside] for part in text)
    for token, bias in params.logit_bias or ():
        if token in inside:
            out[token] += bias
    for token in {*prompt, *generated}:
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token in generated:
        out[token] -= params.frequency_penalty
    for token in set(generated):
        out[token] -= params.presence_penalty
    return out


def random_texts(rng, count, vocab=VOCAB, span=SPAN):
    """Texts of every length up to ``span``, from few enough tokens that many occur more than once."""
    texts = []
    for _ in range(count):
        prompt_len, length = np.sort(rng.integers(0, span + 1, 2))
        tokens = rng.integers(0, vocab // 2, length).tolist()
        texts.append((tokens[:prompt_len], tokens[prompt_len:]))
    return texts


BIAS = {1: 3.0, 2: -3.0, 5: 100.0, 7: -100.0, 11: 0.5, 23: 1.25}
SMALL_BIAS = {0: 1.0, 3: -0.75, 8: 2.0, 22: 0.5}
FEATURES = [
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-2.0),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(frequency_penalty=-0.4),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(repetition_penalty=10.0),
    SamplingParams(logit_bias=BIAS),
    SamplingParams(logit_bias=SMALL_BIAS),
    SamplingParams(presence_penalty=0.3, frequency_penalty=0.4, repetition_penalty=1.3),
    SamplingParams(logit_bias=SMALL_BIAS, presence_penalty=-0.5, frequency_penalty=0.2, repetition_penalty=1.4),
    SamplingParams(temperature=0.6, logit_bias=SMALL_BIAS, repetition_penalty=1.2),
    SamplingParams(top_k=6, logit_bias=SMALL_BIAS, frequency_penalty=0.9),
    SamplingParams(top_p=0.7, presence_penalty=1.0, repetition_penalty=1.5),
    SamplingParams(min_p=0.1, logit_bias=SMALL_BIAS, presence_penalty=0.4),
    SamplingParams(
        temperature=1.4,
        top_k=12,
        top_p=0.9,
        min_p=0.02,
        logit_bias=SMALL_BIAS,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
    ),
]
