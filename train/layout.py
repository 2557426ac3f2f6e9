"""Who has which slot of which group, on the host; and the states that lie in the slots, on the device."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from preft_jax.adapters.config import AdapterConfig
from preft_jax.device.ahead import Program
from train.jobs import Job
from train.optimizer import Numbers
from train.step import Group, Slots, State, flat_slots, fold_config, unstacked


class Place(NamedTuple):
    """A job's group, and its slot there."""

    group: int
    slot: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Groups, and the places of running jobs."""

    groups: tuple[Group, ...] = ()
    places: Mapping[Job, Place] = dataclasses.field(default_factory=dict)

    def slot_of(self, job: Job) -> int:
        """Return a job's slot among those of all groups."""
        place = self.places[job]
        return sum(group.size for group in self.groups[: place.group]) + place.slot

    def without(self, job: Job) -> "Layout":
        """Return the layout after a job has left; its slot is free."""
        return dataclasses.replace(self, places={other: at for other, at in self.places.items() if other is not job})

    def with_job(self, job: Job) -> "Layout":
        """Return the layout with a job in a slot of its group: a free one, or a new one.

        Groups without a job are left out if the job needs a new group: there will be new programs in any case.
        """
        key = _key(job)
        groups, places = list(self.groups), dict(self.places)
        at = next((i for i, group in enumerate(groups) if (group.config, group.optim) == key), None)
        if at is None:
            kept = self.used
            places = {other: place._replace(group=kept.index(place.group)) for other, place in places.items()}
            at, groups = len(kept), [*(groups[i] for i in kept), Group(*key, 0)]
        taken = {place.slot for place in places.values() if place.group == at}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        groups[at] = dataclasses.replace(groups[at], size=max(groups[at].size, slot + 1))
        return Layout(tuple(groups), {**places, job: Place(at, slot)})

    @property
    def used(self) -> list[int]:
        """The groups in which there are jobs."""
        return sorted({place.group for place in self.places.values()})


def moved(before: Layout, after: Layout, job: Job, state: State, own: Slots) -> State:
    """Return the state with a job's own (trees) where ``after``, which is ``before.with_job(job)``, has it."""
    at, slot = after.places[job]
    own = flat_slots(own)
    if all((group.config, group.optim) != _key(job) for group in before.groups):
        return (*(state[i] for i in before.used), _first(own))
    is_new = after.groups[at].size > before.groups[at].size
    new = _grow(state[at], own) if is_new else _put(state[at], own, np.int32(slot))
    return (*state[:at], new, *state[at + 1 :])


def _key(job: Job) -> tuple[AdapterConfig, str]:
    return fold_config(job.initial.config), job.config.optimizer.optim


def _alone(own: Slots) -> Slots:
    return jax.tree.map(lambda leaf: leaf[None], own)


def _grown(slots: Slots, own: Slots) -> Slots:
    return jax.tree.map(lambda stack, leaf: jnp.concatenate([stack, leaf[None]]), slots, own)


def _with(slots: Slots, own: Slots, slot: jax.Array) -> Slots:
    return jax.tree.map(lambda stack, leaf: stack.at[slot].set(leaf), slots, own)


_first = Program(_alone, name="first")
_grow = Program(_grown, name="grow")
_put = Program(_with, name="put")
_take = Program(unstacked, name="take")


def take(slots: Slots, slot: int) -> Slots:
    """Return a copy of what lies in a slot."""
    return _take(slots, np.int32(slot))


def stacked(layout: Layout, numbers: Mapping[Job, Numbers]) -> tuple[Numbers, ...]:
    """Return each group's numbers of the optimizer, ``[n]``; those of slots that do not step do not matter."""
    found = [[Numbers(*[np.float32(1)] * len(Numbers._fields))] * group.size for group in layout.groups]
    for job, own in numbers.items():
        found[layout.places[job].group][layout.places[job].slot] = own
    return tuple(Numbers(*map(np.stack, zip(*some, strict=True))) for some in found)
