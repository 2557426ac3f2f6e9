"""Sampling parameters: which are refused, and how they become arrays."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from sampling_draws import (
    FEATURES,
    SMALL_BIAS,
)

from preft_jax import RequestError, SamplingParams
from preft_jax.sampling.arrays import sampling_arrays
from preft_jax.sampling.parameters import MAX_BIAS

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": 2**31}, f"top_k is {2**31}"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"presence_penalty": 2.01}, "presence_penalty is 2.01"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"repetition_penalty": 10.5}, "repetition_penalty is 10.5"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"repetition_penalty": None}, "repetition_penalty is None"),
        ({"logit_bias": 3}, "logit_bias is 3"),
        ({"logit_bias": "ab"}, "logit_bias is 'ab'"),
        ({"logit_bias": [5, 6]}, r"logit_bias is \[5, 6\]"),
        ({"logit_bias": [(1, 2.0, 3.0)]}, "logit_bias is"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias names the token '7'"),
        ({"logit_bias": {7.0: 1.0}}, "logit_bias names the token 7.0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names the token -1"),
        ({"logit_bias": {2**31: 1.0}}, f"logit_bias names the token {2**31}"),
        ({"logit_bias": {4: 1.0, 7: 100.5}}, "logit_bias gives token 7 the bias 100.5"),
        ({"logit_bias": {7: -101}}, "logit_bias gives token 7 the bias -101"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias gives token 7 the bias nan"),
        ({"logit_bias": {7: float("-inf")}}, "logit_bias gives token 7 the bias -inf"),
        ({"logit_bias": {7: None}}, "logit_bias gives token 7 the bias None"),
        ({"logit_bias": [(7, 1.0), (7, 2.0)]}, "logit_bias names a token more than once"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIAS + 1), 1.0)}, "logit_bias has 301 entries"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, f"seed is {2**32}"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"stop_token_ids": (2**31,)}, "stop_token_ids"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
    ids=str,
)
def test_parameters_that_cannot_work_are_refused_by_name(fields, text):
    with pytest.raises(RequestError, match=text):
        SamplingParams(**fields)


def test_the_limits_of_each_parameter_are_allowed():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, seed=0)
    SamplingParams(temperature=100.0, top_k=-1, top_p=1e-9, min_p=0, seed=2**32 - 1)
    SamplingParams(presence_penalty=2, frequency_penalty=-2, repetition_penalty=10)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9)
    SamplingParams(logit_bias={0: -100, 2**31 - 1: 100} | dict.fromkeys(range(1, MAX_BIAS - 1), 0.0))


def test_numpy_numbers_are_numbers():
    """A sweep over ``np.linspace`` in float32 must not need a cast at each call."""
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), top_p=np.float32(0.9), seed=np.uint32(7))
    SamplingParams(presence_penalty=np.float32(0.5), repetition_penalty=np.float64(2))
    assert SamplingParams(logit_bias={np.int32(3): np.float32(1.5)}) == SamplingParams(logit_bias={3: 1.5})


def test_a_bias_is_kept_frozen():
    """Whatever order it came in, whatever happens to the mapping later; and copies are the same."""
    given = {9: 1.0, 4: -2.0}
    params = SamplingParams(logit_bias=given)
    given[4] = 50.0
    assert params.logit_bias == ((4, -2.0), (9, 1.0))
    same = SamplingParams(logit_bias={4: -2.0, 9: 1.0})
    sampling_arrays([params], [0], 1)
    for other in (same, dataclasses.replace(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert params == other
        assert hash(params) == hash(other)
    assert dataclasses.replace(params, logit_bias=None).logit_bias is None
    assert SamplingParams(logit_bias={}) == SamplingParams()


def test_a_batch_of_parameters_as_arrays():
    """Each field in its type; unused biases are -1 and 0; the rows behind are greedy and ask for nothing."""
    s = sampling_arrays(
        [SamplingParams(temperature=0.5, top_k=4, top_p=0.75, min_p=0.25), FEATURES[10]], [2**32 - 1, 3], 4
    )
    for name, array in s._asdict().items():
        assert isinstance(array, np.ndarray)
        kind = {"top_k_B": np.int32, "seed_B": np.uint32, "bias_token_BM": np.int32}.get(name, np.float32)
        assert array.dtype == kind
        assert array.shape == ((4, MAX_BIAS) if name.endswith("M") else (4,))
    np.testing.assert_array_equal(s.temperature_B, [0.5, 1, 0, 0])
    np.testing.assert_array_equal(s.top_k_B, [4, -1, -1, -1])
    np.testing.assert_array_equal(s.top_p_B, [0.75, 1, 1, 1])
    np.testing.assert_array_equal(s.min_p_B, [0.25, 0, 0, 0])
    np.testing.assert_array_equal(s.seed_B, [2**32 - 1, 3, 0, 0])
    np.testing.assert_array_equal(s.presence_B, np.float32([0, -0.5, 0, 0]))
    np.testing.assert_array_equal(s.frequency_B, np.float32([0, 0.2, 0, 0]))
    np.testing.assert_array_equal(s.repetition_B, np.float32([1, 1.4, 1, 1]))
    np.testing.assert_array_equal(s.bias_token_BM[1, :4], list(SMALL_BIAS))
    np.testing.assert_array_equal(s.bias_BM[1, :4], list(SMALL_BIAS.values()))
    assert (s.bias_token_BM >= 0).sum() == np.count_nonzero(s.bias_BM) == 4
