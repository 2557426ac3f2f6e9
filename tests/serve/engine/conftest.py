"""What tests of the engine share."""

import pytest

from preft_jax.models.batch import bucket
from serve.engine.runner import Runner


@pytest.fixture
def rows_apart(monkeypatch):
    """Let rows without all-token adapters have decode programs for any number of them, as on a CPU.

    A GPU's engine for all-token adapters has one for a few rows, and decodes more of them beside those with adapters.
    """
    choose = Runner._choose_programs

    def chosen(self):
        choose(self)
        if self.adapted_row_counts:
            self.row_counts = sorted({max(bucket(self.config.max_num_seqs) // 4, 1), self.config.max_num_seqs})
            self.adapted_row_counts = self.row_counts

    monkeypatch.setattr(Runner, "_choose_programs", chosen)
