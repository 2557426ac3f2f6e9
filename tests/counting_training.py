"""A service of jobs without a model: training that only counts, and a store that knows names only."""

import dataclasses
import queue

from train.results import Result
from train.service import keeping, results
from train.service.options import ServiceOptions
from train.service.service import Service


@dataclasses.dataclass(eq=False)
class CountedJob:
    """A job of which nothing is learned."""

    name: str
    total_steps: int
    step: int = 0
    failed: str | None = None
    held_out: tuple = ()

    @property
    def done(self):
        return self.step == self.total_steps


class CountingTraining:
    """Training whose updates do nothing; the test calls ``update``, as an engine would."""

    def __init__(self, hooks, ended):
        self.hooks, self.ended = hooks, ended
        self.inbox = queue.SimpleQueue()
        self.running, self.begun = [], []
        self.most = 0

    def join(self, job, state=None):
        self.inbox.put(job)

    def leave(self, job):
        raise AssertionError("nobody is to leave")

    def close(self):
        pass

    def join_waiting(self):
        """Let jobs join, as an update does before anything else."""
        while not self.inbox.empty():
            job = self.inbox.get()
            self.running.append(job)
            self.begun.append(job.name)
            self.hooks.joined(job)

    def update(self):
        self.join_waiting()
        self.most = max(self.most, len(self.running))
        for job in list(self.running):
            job.step += 1
            self.hooks.updated(Result(job, job.step, 1.0 / job.step, 0.5, 1e-3, True, {}, 10))
            if self.hooks.keeps(job):
                self.hooks.kept(job, job.step, None)
            if job.done:
                self.running.remove(job)
                self.ended(job, None)
        return bool(self.running)


class Names:
    """A store that knows names only."""

    durable = False

    def __init__(self):
        self.owners = {}

    def check(self, config):
        pass

    def get(self, name):
        return None

    def register(self, name, path, *, owner, replace):
        self.owners[name] = owner

    def reads(self, path):
        return False

    def unregister(self, name):
        self.owners.pop(name, None)


def counting_service(patch, model, directory, clock=None, **options):
    """Return a service whose jobs have as many updates as ``max_steps``, its training, its store, and states kept.

    ``patch``: what is patched so that nothing of an adapter is written; the caller closes the service.
    """
    made, kept = [], []
    patch.setattr(keeping, "save_adapter", lambda path, adapter: path.mkdir())
    patch.setattr(results, "save_state", lambda entry, model, job, step, state: kept.append((job.name, step)))

    def load(entry, plan, model, options, wanted):
        return CountedJob(entry.record.id, plan.config.max_steps)

    def training(*args):
        made.append(CountingTraining(*args))
        return made[0]

    store = Names()
    service = Service(
        model, store, directory, load=load, options=ServiceOptions(**options), make_training=training,
        **({} if clock is None else {"clock": clock}),
    )  # fmt: skip
    return service, made[0], store, kept
