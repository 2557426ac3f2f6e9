"""Sampling parameters of many rows as arrays."""

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kernels.types import Array
from preft_jax.sampling.parameters import MAX_BIAS, SamplingParams

_LEAST_TEMPERATURE = 1e-30
"""Smaller ones count as this one: devices take the smallest float32 numbers for zero."""


_LEAST_REPETITION = 1e-20
"""Smaller ones count as this one: a logit divided by it must stay finite."""


_NUMBERS = operator.attrgetter(
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
)


class PlainSampling(NamedTuple):
    """What rows need that have a temperature and a seed only: float32 and uint32, ``[B]``."""

    temperature_B: Array
    seed_B: Array


class SamplingArrays(NamedTuple):
    """``SamplingParams`` of a batch as arrays of shape ``[B]``: float32, ``top_k_B`` int32, ``seed_B`` uint32.

    Biases are ``[B, MAX_BIAS]``: int32 token ids, padded with -1, and float32 biases, padded with 0.
    """

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    seed_B: Array
    presence_B: Array
    frequency_B: Array
    repetition_B: Array
    bias_token_BM: Array
    bias_BM: Array

    @property
    def plain(self) -> PlainSampling:
        """The temperature and the seed."""
        return PlainSampling(self.temperature_B, self.seed_B)


def sampling_arrays(params: Sequence[SamplingParams], seeds: Sequence[int], size: int) -> SamplingArrays:
    """Stack the parameters of a batch in NumPy arrays, padded to ``size`` rows with greedy ones."""
    padding = size - len(params)
    arrays = SamplingArrays(
        temperature_B=np.empty(size, np.float32),
        top_k_B=np.empty(size, np.int32),
        top_p_B=np.empty(size, np.float32),
        min_p_B=np.empty(size, np.float32),
        seed_B=np.empty(size, np.uint32),
        presence_B=np.empty(size, np.float32),
        frequency_B=np.empty(size, np.float32),
        repetition_B=np.empty(size, np.float32),
        bias_token_BM=np.empty((size, MAX_BIAS), np.int32),
        bias_BM=np.empty((size, MAX_BIAS), np.float32),
    )
    _fill(arrays, [*params, *[SamplingParams(temperature=0.0)] * padding], [*seeds, *[0] * padding])
    return arrays


def _fill(arrays: SamplingArrays, params: Sequence[SamplingParams], seeds: Sequence[int]) -> None:
    """Write the parameters of all rows, all fields."""
    table = np.fromiter(itertools.chain.from_iterable(map(_NUMBERS, params)), np.float64)
    temperature, top_k, top_p, min_p, presence, frequency, repetition = table.reshape(-1, 7).T
    arrays.temperature_B[:] = np.where(temperature > 0, np.maximum(temperature, _LEAST_TEMPERATURE), 0.0)
    arrays.top_k_B[:] = top_k
    arrays.top_p_B[:] = top_p
    arrays.min_p_B[:] = min_p
    arrays.seed_B[:] = seeds
    arrays.presence_B[:] = presence
    arrays.frequency_B[:] = frequency
    arrays.repetition_B[:] = np.maximum(repetition, _LEAST_REPETITION)
    arrays.bias_token_BM[:] = -1
    arrays.bias_BM[:] = 0.0
    for row, p in enumerate(params):
        if p.logit_bias:
            token_M, bias_M = p._bias_arrays
            arrays.bias_token_BM[row, : len(token_M)] = token_M
            arrays.bias_BM[row, : len(bias_M)] = bias_M
