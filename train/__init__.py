"""Training: adapters on a frozen base model. Programs: ``train.sft``, ``train.rl``.

    adapters = fit(model, [Job(JobConfig(name="ann", max_steps=100), model, examples)])

Names are loaded when they are asked for.
"""

from typing import TYPE_CHECKING

from preft_jax.lazy import forwarded

if TYPE_CHECKING:
    from train.data.batches import BatchOptions as BatchOptions
    from train.data.documents import Document as Document
    from train.data.documents import sampled_document as sampled_document
    from train.data.rows import DataOptions as DataOptions
    from train.data.rows import Example as Example
    from train.data.rows import make_examples as make_examples
    from train.fitting import Fitted as Fitted
    from train.fitting import fit as fit
    from train.jobs import Job as Job
    from train.jobs import JobConfig as JobConfig
    from train.losses import register_loss as register_loss
    from train.optimizer import OptimizerConfig as OptimizerConfig
    from train.trainer import Trainer as Trainer
    from train.trainer import TrainOptions as TrainOptions

__all__ = [
    "BatchOptions",
    "DataOptions",
    "Document",
    "Example",
    "Fitted",
    "Job",
    "JobConfig",
    "OptimizerConfig",
    "TrainOptions",
    "Trainer",
    "fit",
    "make_examples",
    "register_loss",
    "sampled_document",
]

__getattr__ = forwarded(
    __name__,
    {
        "train.data.batches": ("BatchOptions",),
        "train.data.documents": (
            "Document",
            "sampled_document",
        ),
        "train.data.rows": (
            "DataOptions",
            "Example",
            "make_examples",
        ),
        "train.fitting": (
            "Fitted",
            "fit",
        ),
        "train.jobs": (
            "Job",
            "JobConfig",
        ),
        "train.losses": ("register_loss",),
        "train.optimizer": ("OptimizerConfig",),
        "train.trainer": (
            "TrainOptions",
            "Trainer",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
