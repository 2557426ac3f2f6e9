"""Files that must lie below some directories, however their names change between a check and the opening."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

_LEADS_OUT = "it is a link that leads out of the directories in which it must lie, or changes while it is read"


def open_below(path: str | os.PathLike[str], roots: Iterable[str | os.PathLike[str]], flags: int) -> int:
    """Return a descriptor of a regular file that lies below one of some directories.

    Links are resolved first, and may lead anywhere below the directories. What they resolved to is then opened name by
    name from the directory down, without following a link: one that was put there meanwhile leads nowhere.

    Args:
        path: the file.
        roots: the directories' real paths.
        flags: of ``os.open``.

    Raises:
        OSError: if it does not lie there, whether what a link leads to exists or not, or it is no regular file.
    """
    real = Path(os.path.realpath(path))
    root = next((Path(root) for root in roots if real.is_relative_to(root) and real != Path(root)), None)
    if root is None:
        raise PermissionError(errno.EPERM, _LEADS_OUT)
    if os.open not in os.supports_dir_fd:  # Windows, where links are the administrator's to make.
        return os.open(real, flags)
    *parents, name = real.relative_to(root).parts
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        kind = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise OSError(errno.EINVAL, "it is not a regular file")
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as cause:
        if cause.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PermissionError(errno.EPERM, _LEADS_OUT) from None
        raise
    finally:
        os.close(folder)
