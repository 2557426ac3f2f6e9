"""Jobs from their options: checked against the base model, with the adapters they start from and their data."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from preft_jax.errors import ConfigError
from preft_jax.loading import Model
from train.data import builtin as builtin_task
from train.data.rows import Example, load_examples, make_examples
from train.jobs import Job, JobConfig, first_adapter


def load_jobs(configs: Sequence[JobConfig], model: Model, num_devices: int) -> list[Job]:
    """Return jobs on a base model that is spread over so many devices; batch sizes of ``configs`` are a device's.

    Raises:
        ConfigError: if options do not fit the model or the adapter to start from.
        DataError: if a dataset is bad.
    """
    for config in configs:
        prefix = config.adapter.prefix_length
        positions = model.config.max_position_embeddings - prefix
        if config.batches.max_length > positions and not config.batches.packing:
            behind = f" behind a learned prefix of {prefix}" if prefix else ""
            raise ConfigError(
                f"max_length is {config.batches.max_length} and the model has {positions} positions{behind}; lower it"
            )
    return [
        _load(config, model, num_devices, f"job {config.name!r}: " if len(configs) > 1 else "") for config in configs
    ]


def _load(config: JobConfig, model: Model, num_devices: int, where: str) -> Job:
    try:
        initial = first_adapter(config, model)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    rows = config.batches.batch_size * num_devices
    config = dataclasses.replace(
        config, adapter=initial.config, batches=dataclasses.replace(config.batches, batch_size=rows)
    )
    if config.dataset is None:
        train, held_out = (_examples(rows, config, model) for rows in builtin_task.rows())
        return Job(config, model, train, held_out, initial)
    read = functools.partial(
        load_examples, model=model, adapter=config.adapter, options=config.data, config=config.dataset_config
    )
    examples = read(config.dataset, split=config.dataset_train_split)
    held_out = []
    if config.eval_dataset is not None:
        held_out = read(config.eval_dataset, split=config.dataset_test_split, default="test")
    return Job(config, model, examples, held_out, initial)


def _examples(rows: Sequence[dict[str, Any]], config: JobConfig, model: Model) -> list[Example]:
    made = [make_examples(row, model, config.adapter, config.data, line=line) for line, row in enumerate(rows, 1)]
    return [example for some in made for example in some]
