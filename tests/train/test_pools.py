"""The rank pages of training are the bank's: one cutter makes both."""

import jax.numpy as jnp
import numpy as np
import train_cases as cases

from preft_jax.adapters.pages import pack_adapter
from train.data.batches import Rows, collate
from train.step import Group, edits_by_layer, empty_slots, fold_config, make_edits, plan_pages


def test_the_trainers_pools_are_the_pages_of_its_adapters(lively, adapters):
    """Of every kind beside each other, two slots each; each page where ``plan_pages`` says."""
    kinds = ("lora", "lora_pattern", "direft_free", "loreft_f3l2")
    groups = tuple(Group(fold_config(adapters[kind].config), "adamw", 2) for kind in kinds)
    params = [empty_slots(group, adapters[kind].params).params for kind, group in zip(kinds, groups, strict=True)]
    example = cases.example(adapters["lora"], np.random.default_rng(0))
    batch = collate([Rows([[example]], 0, 0, 0)], num_rows=1, max_length=32, packed=False)
    layers = edits_by_layer(lively.config, groups, params, jnp.float32)
    edits = make_edits(lively.config, groups, layers, batch, None)
    plan = plan_pages(lively.config, groups)
    for slot in range(2 * len(kinds)):
        packed = pack_adapter(adapters[kinds[slot // 2]], lively.config)
        for site, expected in packed.items():
            ids = plan.page_JE[site][slot, : len(expected.groups)]
            assert tuple(plan.group_JE[site][slot, : len(expected.groups)]) == expected.groups
            for layer, pools in enumerate(edits.pools):
                for pool, array in zip(pools[site], expected, strict=False):
                    # Rows that a program makes orthonormal for several slots at once are rounded otherwise.
                    np.testing.assert_allclose(pool[ids], array[layer], atol=1e-6)
                    assert not np.asarray(pool[0]).any(), "the null page"
