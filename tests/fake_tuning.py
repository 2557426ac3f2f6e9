"""Fine-tuning whose jobs do what a test says, and a server with it that has no model."""

import dataclasses
import itertools
import threading
import types

from scripted_engine import ScriptedEngine

from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import ConfigError, LimitError
from serve.engine.async_engine import AsyncEngine
from serve.jobs import OPEN, Checkpoint, Event, JobRecord
from serve.server.auth import Keys
from serve.server.serving import Serving
from serve.server.tuning import Tuning
from serve.store.uploads import UploadLimits, Uploads

MODEL = "tiny"
KNOWN = {"n_epochs", "batch_size", "learning_rate_multiplier", "rank", "adapter_kind"}


class FakeFineTuning:
    """Jobs in memory; ``begin``, ``learn`` and ``finish`` let one go on. ``before``: one whose jobs are taken over."""

    is_compiling = False

    def __init__(self, before=None):
        self.clear()
        self.closed = False
        self._lock = threading.Lock()
        if before is not None:
            self.jobs, self.happened, self.kept = before.jobs, before.happened, before.kept

    def clear(self):
        self.jobs, self.happened, self.kept, self.deleted = {}, {}, {}, []
        self.most = 4
        self._ids = itertools.count()

    def _id(self, kind):
        return f"{kind}-{next(self._ids):024d}"

    def _set(self, job_id, **fields):
        with self._lock:
            self.jobs[job_id] = dataclasses.replace(self.jobs[job_id], **fields)
            return self.jobs[job_id]

    def create(self, spec, *, owner):
        unknown = [name for name in spec.hyperparameters if name not in KNOWN]
        if unknown:
            raise ConfigError(f"unknown hyperparameter {unknown[0]!r}; allowed: {', '.join(sorted(KNOWN))}")
        if sum(job.owner == owner and job.status in OPEN for job in self.jobs.values()) >= self.most:
            raise LimitError(f"there are {self.most} open jobs, and no more may be")
        spec = dataclasses.replace(spec, seed=7 if spec.seed is None else spec.seed)
        job = JobRecord(
            id=self._id("ftjob"), owner=owner, model=MODEL, spec=spec, status="validating_files",
            created_at=1_700_000_000 + len(self.jobs),
        )  # fmt: skip
        with self._lock:
            self.jobs[job.id], self.happened[job.id], self.kept[job.id] = job, [], []
        self.say(job.id, "created")
        return job

    def say(self, job_id, message, **data):
        kind = "metrics" if data else "message"
        event = Event(
            id=self._id("ftevent"), created_at=1_700_000_000, level="info", message=message, type=kind, data=data
        )
        self.happened[job_id].insert(0, event)

    def begin(self, job_id, steps=4):
        rows = self.jobs[job_id].spec.training_path.read_text().splitlines()
        self._set(job_id, status="running", total_steps=steps)
        return rows

    def learn(self, job_id, loss):
        job = self.jobs[job_id]
        self._set(job_id, step=job.step + 1, trained_tokens=job.trained_tokens + 10)
        self.say(job_id, f"Step {job.step + 1}", step=job.step + 1, train_loss=loss)

    def keep(self, job_id, name):
        step = self.jobs[job_id].step
        one = Checkpoint(
            id=self._id("ftckpt"), created_at=1_700_000_000, step_number=step, fine_tuned_model_checkpoint=name,
            metrics={"train_loss": 0.5, "valid_loss": float("nan")},
        )  # fmt: skip
        self.kept[job_id].insert(0, one)

    def finish(self, job_id, name):
        self._set(job_id, status="succeeded", fine_tuned_model=name, finished_at=1_700_000_999)

    def get(self, job_id):
        return self.jobs.get(job_id)

    def list(self):
        return sorted(self.jobs.values(), key=lambda job: job.id, reverse=True)

    def events(self, job_id):
        return self.happened[job_id]

    def checkpoints(self, job_id):
        return self.kept[job_id]

    def _change(self, job_id, status, allowed, **fields):
        if self.jobs[job_id].status not in allowed:
            raise ConfigError(f"the job is {self.jobs[job_id].status}; allowed: {', '.join(sorted(allowed))}")
        return self._set(job_id, status=status, **fields)

    def cancel(self, job_id):
        return self._change(job_id, "cancelled", OPEN, finished_at=1_700_000_999)

    def pause(self, job_id):
        return self._change(job_id, "paused", OPEN - {"paused"})

    def resume(self, job_id):
        return self._change(job_id, "queued", {"paused"})

    def delete_model(self, name):
        made = [job for job in self.jobs.values() if job.fine_tuned_model == name]
        return bool(made) and self.deleted.append(name) is None

    def close(self):
        self.closed = True


class NoAdapters:
    """A store that has none; ``owners``: of those that it pretends to have."""

    def __init__(self):
        self.owners = {}

    def get(self, name):
        if name not in self.owners:
            return None
        return types.SimpleNamespace(name=name, owner=self.owners[name], created=0.0, config=AdapterConfig())

    def list(self):
        return []

    def tiers(self):
        return {}

    def close(self):
        pass


def make_serving(root, keys=None, admin=None, limits=None, jobs=None, seconds=60.0):
    """Return a server without a model; ``root``: where uploads are kept, None: without fine-tuning."""
    tuning = None
    if root is not None:
        uploads = Uploads(root, limits or UploadLimits())
        tuning = Tuning(jobs=jobs or FakeFineTuning(), uploads=uploads, upload_seconds=seconds)
    return Serving(
        model=types.SimpleNamespace(tokenizer=None, config=None),
        names=(MODEL,),
        engine=AsyncEngine(ScriptedEngine(free=True)),
        adapters=NoAdapters(),
        keys=Keys(keys or {}, admin),
        max_model_len=128,
        max_body_bytes=2**16,
        tuning=tuning,
    )
