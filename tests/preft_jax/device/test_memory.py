"""The budget of a device's memory."""

import jax
import pytest

from preft_jax.device.memory import Budget, devices_of, limit
from preft_jax.errors import ConfigError


def test_shares_are_leased_by_name_and_given_back():
    budget = Budget(100, used=20)
    cache = budget.lease("KV cache", 50)
    with budget.lease("training", 20), budget.lease("training", 5):
        assert budget.shares() == {"KV cache": 50, "training": 25}
        assert budget.free == 5
    cache.give_back()
    cache.give_back()
    assert (budget.free, budget.shares()) == (80, {})


def test_what_does_not_fit_is_refused_with_who_has_what_and_nothing_changes():
    gib = 1 << 30
    budget = Budget(80 * gib, used=16 * gib)
    budget.lease("KV cache", 60 * gib)
    with pytest.raises(
        ConfigError, match=r"training needs 8.00 GiB .* 4.00 of 80.00 .*KV cache 60.00; .*before: 16.00"
    ):
        budget.lease("training", 8 * gib)
    assert budget.free == 4 * gib


def test_shares_are_asked_back_the_latest_first_and_no_more_than_needed():
    budget, asked = Budget(100), []

    def asks(name):
        def ask_back():
            asked.append(name)
            leases[name].give_back()

        return ask_back

    leases = {name: budget.lease(name, 25, asks(name)) for name in ("old", "new")}
    budget.lease("fixed", 50)
    budget.lease("KV cache", 20)
    assert asked == ["new"]
    assert budget.shares() == {"old": 25, "fixed": 50, "KV cache": 20}
    with pytest.raises(ConfigError):
        budget.lease("too much", 80)


def test_a_cpu_has_no_budget():
    array = jax.numpy.zeros(3)
    assert devices_of({"a": array, "b": 1}) == array.devices()
    if jax.default_backend() == "cpu":
        assert limit(devices_of(array)) is None
        assert Budget.of(devices_of(array), 0.9) is None
