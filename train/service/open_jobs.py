"""A job that has not ended, as the service has it in memory."""

import dataclasses

from train.jobs import Job
from train.service.options import Plan, ServiceOptions
from train.service.records import Entry


@dataclasses.dataclass(eq=False)
class OpenJob:
    """A job that has not ended.

    Attributes:
        entry: its record.
        plan: what it is to do.
        read: its rows, if they were read and it was not handed over to training yet; one job at most has them.
        job: what training has, from when it was handed over until it has left.
        in_training: whether its place is taken among those that are trained: from when it is about to be handed over.
        wants_checkpoint: whether its adapter is to be served as it is after the next update.
        checkpoint_step: the step of that update.
        writing: whether a state of it waits to be written.
        kept_at: when it joined training, or when the last state that is written was taken; seconds.
        updated_at: when it joined training, or its last update was started.
        metrics: the latest ones.
    """

    entry: Entry
    plan: Plan
    read: Job | None = None
    job: Job | None = None
    in_training: bool = False
    wants_checkpoint: bool = False
    checkpoint_step: int | None = None
    writing: bool = False
    kept_at: float = 0.0
    updated_at: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def is_due(self, step: int, now: float, options: ServiceOptions) -> bool:
        """Whether the state after an update started now is to be written, for after the next it may be too late."""
        took = now - self.updated_at
        return step % options.checkpoint_steps == 0 or now + took - self.kept_at > options.checkpoint_seconds

    def is_served_at(self, step: int) -> bool:
        """Whether the adapter after so many updates is one that is served."""
        every = self.plan.save_steps
        return step == self.checkpoint_step or (every > 0 and step % every == 0)
