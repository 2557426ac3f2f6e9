"""Rows, jobs and services of fine-tuning that tests share."""

import json
import time

import jax
import numpy as np

from serve.jobs import JobSpec
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry
from train.cutting import WindowOptions
from train.service.options import ServiceOptions
from train.service.service import Service

WINDOWS = WindowOptions(tokens=32, layers=1)
_BOTH = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "batch_size": 4, "max_length": 64}
LORA = _BOTH | {"rank": 8, "lora_alpha": 12.0, "targets": "gate,up"}
REFT = _BOTH | {"adapter_kind": "loreft", "rank": 6, "positions": "f3+l2", "share_weights": False}
"""Hyperparameters with which programs are those of ``tests/train/test_coserve.py``."""

PATIENCE = 600.0
"""Seconds after which what other threads were to do will not be done."""


def write_rows(path, seed=0, count=6):
    """Write rows of random letters: at most 30 tokens each."""
    rng = np.random.default_rng(seed)

    def text(low, high):
        return "".join(chr(97 + c) for c in rng.integers(0, 26, int(rng.integers(low, high))))

    rows = [{"prompt": text(4, 18), "completion": text(2, 8)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec(path, hyperparameters=LORA, **fields):
    """Return what a job is asked to do; six rows in two batches an epoch."""
    return JobSpec(**{"training_file": "file-1", "training_path": path, "seed": 5, "hyperparameters": hyperparameters,
                      **fields})  # fmt: skip


def make_store(model, directory=None, **options):
    """Return a store, one that remembers names if it has a directory."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    registry = Registry(None if directory is None else directory / "adapters.sqlite")
    return AdapterStore(AdapterFiles(model), registry, host_bytes=10**8, **options)


def make_service(model, directory, store=None, **options):
    """Return a service; the caller closes it."""
    return Service(
        model, store or make_store(model), directory, name="tiny", options=ServiceOptions(**options), windows=WINDOWS
    )


def until(condition, seconds=PATIENCE):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


class Pump:
    """Runs training's units one after the other, as an engine without requests does."""

    def __init__(self, service, model):
        self.service = service
        self.params = model.params

    def unit(self):
        """Run a unit, if there is one."""
        training = self.service.training
        unit = training.next()
        if unit is None:
            return False
        try:
            jax.block_until_ready(unit.start(self.params))
            training.done(unit, 1e-3)
        except Exception as error:
            training.failed(unit, error)
        return True

    def until(self, condition, seconds=PATIENCE):
        """Run units until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come"
            if not self.unit():
                time.sleep(0.002)

    def learn(self, record, step):
        """Run units until training has started a job's update of this number, and the service knows that it runs."""
        trainer = self.service.training.trainer
        self.until(lambda: any(job.name == record.id and job.step >= step for job in trainer.running))
        until(lambda: self.service.get(record.id).status == "running")

    def to_end(self, *records):
        """Run units until jobs have ended; return their records as they are then."""
        ids = [record.id for record in records]
        self.until(lambda: all(self.service.get(one).finished_at is not None for one in ids))
        return [self.service.get(one) for one in ids]
