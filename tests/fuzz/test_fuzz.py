"""Both fuzzers for a fixed number of inputs; their programs go on for as long as they are told."""

import asyncio

from fuzz import adapters, bodies


def test_a_mutated_adapter_loads_whole_or_is_refused(tmp_path):
    ends = adapters.run(tmp_path, seed=1, until=lambda number: number == 800)
    assert ends["loaded"] > 50
    assert ends["refused"] > 400


def test_a_mutated_body_is_answered_as_documented_and_leaves_nothing(lively, tmp_path):
    ends = asyncio.run(bodies.run(tmp_path, lively, seed=1, until=lambda number: number == 2500))
    assert ends[200] > 200
    assert ends[400] > 1000
    assert set(ends) == {200, *bodies.CODES}
