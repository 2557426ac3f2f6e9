"""What the routes of files and of fine-tuning jobs share."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve.jobs import OPEN, FineTuning
from serve.server.auth import Identity
from serve.server.failures import ApiError
from serve.store.uploads import Uploads

_THREADS = 8


@dataclasses.dataclass(kw_only=True)
class Tuning:
    """Fine-tuning beside serving.

    Attributes:
        jobs: runs them.
        uploads: the files that they read.
        upload_seconds: that an upload may take to arrive.
        one_at_a_time: held while a job is made or a file deleted, so that no job gets a file that is gone.
    """

    jobs: FineTuning
    uploads: Uploads
    upload_seconds: float = 600.0
    one_at_a_time: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "fine-tuning")

    async def disk[T](self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function gives that may wait for the disk.

        Its threads do nothing else: a disk that hangs delays only files and jobs.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def check_change(self, identity: Identity, owner: str | None) -> None:
        """Raise an ``ApiError`` (403) for who sees something and may not change it: what is everybody's."""
        if not identity.changes(owner):
            raise ApiError(403, "it is everybody's, and only the admin's key may change it", code="admin_only")

    def reader_of(self, file_id: str) -> str | None:
        """Return the id of a job that has not read a file yet, if there is one."""
        for job in self.jobs.list():
            unread = job.status in OPEN and job.total_steps is None
            if unread and file_id in (job.spec.training_file, job.spec.validation_file):
                return job.id
        return None

    def close(self, seconds: float | None = None) -> bool:
        """Stop the jobs, which go on at the next start, and let others use the uploads.

        Args:
            seconds: that this may take; None: as many as it takes. Jobs cannot be stopped while a program is compiled.

        Returns:
            Whether it is done.
        """
        closing = threading.Thread(target=self._close, name="fine-tuning-close", daemon=True)
        closing.start()
        closing.join(seconds)
        return not closing.is_alive()

    def _close(self) -> None:
        self.jobs.close()
        self._threads.shutdown(wait=False)
        self.uploads.close()
