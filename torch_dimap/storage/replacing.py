"""A file is written beside its target first and takes its place when it is whole.

What was there before stays until then, whatever happens: an error, a full disk, a kill.
The temporary file is ``.<name>.torch_dimap-part`` in the target's folder. An error removes
it; what a kill leaves of it is overwritten by the next call for the same target.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Write = Callable[[Any, int], None]  # writes bytes-like data at an offset


def check_target(
    target: str | os.PathLike[str], caller: str, force: bool, sources: Iterable[Path] = ()
) -> Path:
    """Refuse a target that must not be written, before the work begins.

    Args:
        target: where to write. Of a symbolic link it is what the link points to.
        caller: the function's name for messages.
        force: whether a file that exists may be replaced.
        sources: files that are read meanwhile; none of them may be the target.

    Returns:
        The target without links.

    Raises:
        ValueError: if it is one of the sources, also by another name, or no regular file.
        OSError: if it exists without ``force``, is read-only, or has no folder.
    """
    path = Path(os.path.realpath(target))
    if not path.exists():
        if not path.parent.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, f"{caller}: there is no folder {path.parent}: make it first"
            )
        return path
    if any(os.path.samefile(path, source) for source in sources):
        raise ValueError(
            f"{caller}: the target must be another file than the source, found {path} as both: "
            "what is pruned away could not be had again."
        )
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{caller}: the target must be a regular file, which {path} is not.")
    if not force:
        raise FileExistsError(
            errno.EEXIST,
            f"{caller}: {path} exists: name another target, or pass force=True (--force)",
        )
    # The superuser may write read-only files too, but hardly means to.
    if not os.access(path, os.W_OK) or not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EACCES, f"{caller}: {path} is read-only: unlock it first")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Write]:
    """Yield a function that writes the new content of a file, which appears at the end.

    Args:
        path: as :func:`check_target` returned it; its permissions stay as they are.

    Raises:
        OSError: if the disk refuses, or another process is writing the same file.
    """
    temporary = path.with_name(f".{path.name}.torch_dimap-part")
    with _telling(path):
        descriptor = _claim(temporary)

    def write(data: Any, offset: int) -> None:
        rest = memoryview(data).cast("B")
        with _telling(path):
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    try:
        yield write
        with _telling(path):
            if path.exists():
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            os.fsync(descriptor)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Name the file in the disk's errors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path} cannot be written: {reason}") from error


def _claim(temporary: Path) -> int:
    """Open the temporary file, empty, unless another process is writing it."""
    import fcntl  # here, since Windows has none

    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking another process may have made it the target.
            if temporary.exists() and os.path.samestat(os.fstat(descriptor), temporary.stat()):
                os.truncate(descriptor, 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(errno.EBUSY, "another process is writing it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a renaming outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
