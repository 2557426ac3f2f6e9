"""Gives samples their rewards, each task's by its own process, and counts what came of it."""

import contextlib
from collections.abc import Sequence

from train.rollouts.learning import punishment
from train.rollouts.rewards import Question, RewardProcess
from train.rollouts.samples import Group, RolloutJob


class Rewarder:
    """The reward processes of jobs; jobs of one reward share a process. A context manager that leaves none."""

    def __init__(self) -> None:
        self._processes: dict[tuple[str, float], RewardProcess] = {}

    def __enter__(self) -> "Rewarder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, jobs: Sequence[RolloutJob]) -> None:
        """Start the processes.

        Raises:
            ConfigError: if there is no such reward.
        """
        for job in jobs:
            self._of(job).start()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.close()

    def reward(self, job: RolloutJob, groups: Sequence[Group], *, punish: bool = True) -> None:
        """Give the samples of a job their rewards; one that gets none has the reason in ``error``.

        Args:
            job: whose task says what rewards them.
            groups: whose samples have no rewards yet.
            punish: take off what samples lose for their length.
        """
        asked = [(group, sample) for group in groups for sample in group.samples if sample.error is None]
        questions = [Question(group.prompt.prompt, sample.text, group.prompt.row) for group, sample in asked]
        for (_, sample), found in zip(asked, self._of(job).rewards(questions), strict=True):
            if found.value is None:
                sample.error = found.error
            else:
                off = punishment(len(sample.token_ids), job.options) if punish else 0.0
                sample.reward = found.value - off

    def _of(self, job: RolloutJob) -> RewardProcess:
        key = job.task.reward, job.options.reward_timeout
        if key not in self._processes:
            self._processes[key] = RewardProcess(*key)
        return self._processes[key]
