"""A program with a fine-tuning service and no requests; ``test_killed`` ends it in the middle.

    python -m tests.train.service.killed DIRECTORY ROWS

It creates a job if there is none, prints a line once it has begun, and ends when the job has.
"""

import sys
import time
from pathlib import Path

import jax

import preft_jax
from serve.jobs import JobSpec
from serve.store.files import AdapterFiles
from serve.store.host import AdapterStore
from serve.store.names import Registry
from train.cutting import WindowOptions
from train.service.options import ServiceOptions
from train.service.service import Service

HYPERPARAMETERS = {"rank": 4, "learning_rate": 3e-3, "batch_size": 4, "max_steps": 30, "save_steps": 10,
                   "max_length": 64}  # fmt: skip


def main(directory: Path, rows: Path) -> int:
    """Run until the job has ended."""
    model = preft_jax.load_model("tiny", dtype="float32")
    store = AdapterStore(
        AdapterFiles(model, directory / "pages"), Registry(directory / "adapters.sqlite"), host_bytes=10**8
    )
    for adapter in store.list():  # What is served is whole.
        assert AdapterFiles(model).read(adapter.path).digest == adapter.digest
    service = Service(
        model, store, directory / "jobs", name="tiny", windows=WindowOptions(tokens=32, layers=1),
        options=ServiceOptions(checkpoint_steps=2),
    )  # fmt: skip
    if not service.list():
        spec = JobSpec(training_file="file-1", training_path=rows, seed=5, hyperparameters=HYPERPARAMETERS)
        service.create(spec, owner="ann")
    print("begun", flush=True)
    (job,) = service.list()
    while service.get(job.id).finished_at is None:
        unit = service.training.next()
        if unit is None:
            time.sleep(0.002)
        else:
            jax.block_until_ready(unit.start(model.params))
            service.training.done(unit, 1e-3)
    service.close()
    record = service.get(job.id)
    named = store.get(record.fine_tuned_model or "")
    print(record.status, record.step, record.trained_tokens, named and named.digest, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
