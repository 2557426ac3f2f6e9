"""Samples to read: ``transcripts.txt``, with the best, the worst and a random sample of each step that is logged.

A step's first line begins at the margin, ``=== step 12, adapter``; all that a model wrote is indented. So the file can
be cut behind a step when a run is resumed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.rollouts.samples import Group, Sample

_HEADER = re.compile(r"=== step (\d+), (.*)")


class Transcripts:
    """The file of a run.

    Args:
        path: of the file.
        keep_until: each job's steps in the checkpoint that is resumed; None begins anew.
    """

    def __init__(self, path: Path, *, keep_until: Mapping[str, int] | None = None):
        kept: list[str] = []
        if keep_until is not None and path.exists():
            kept = _until(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), keep_until)
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, job: str, groups: Sequence[Group]) -> None:
        """Append a step's samples."""
        given = [(group, sample) for group in groups for sample in group.samples]
        rewarded = sorted((one for one in given if one[1].error is None), key=lambda one: one[1].reward)
        self._file.write(f"=== step {step}, {job}\n")
        if rewarded:
            drawn = rewarded[np.random.default_rng(step).integers(len(rewarded))]
            for title, (group, sample) in (("best", rewarded[-1]), ("worst", rewarded[0]), ("random", drawn)):
                self._file.write(_told(title, group, sample))
        for group, sample in [one for one in given if one[1].error is not None][:1]:
            self._file.write(_told("dropped", group, sample))
        self._file.write("\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _told(title: str, group: Group, sample: Sample) -> str:
    reward = f"no reward: {sample.error}" if sample.error is not None else f"reward {sample.reward:.3f}"
    cut = ", cut off" if sample.is_truncated else ""
    head = f"--- {title}: {reward}, {len(sample.token_ids)} tokens{cut}\n".replace("\n", " ").rstrip() + "\n"
    return f"{head}  prompt:\n{_indented(_text(group.prompt.prompt))}  completion:\n{_indented(sample.text)}"


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])


def _until(lines: Sequence[str], last: Mapping[str, int]) -> list[str]:
    """Return the lines of steps up to each job's last."""
    kept, keeping = [], True
    for line in lines:
        header = _HEADER.fullmatch(line.rstrip("\n"))
        if header is not None:
            keeping = int(header[1]) <= last.get(header[2], int(header[1]))
        if keeping:
            kept.append(line)
    return kept
