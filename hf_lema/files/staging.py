"""Files and folders that are whole or absent: written under a temporary name beside their own, renamed at the end.

Responsibility: temporary names, the lock that says that a writer lives, what dead writers left, disk space, fsync and
rename. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from pathlib import Path
from types import TracebackType

from hf_lema.units import format_bytes


def partial_path(path: Path) -> Path:
    """The temporary name under which this process writes ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_stale_partials(path: Path) -> None:
    """Remove temporary files and folders of the same name whose writer was killed: no living writer locks them."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # its writer has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def require_disk_space(folder: Path, needed_bytes: int, what: str, remedy: str) -> None:
    """See that a folder's disk has room.

    Args:
        folder: It exists.
        needed_bytes: How much will be written.
        what: What needs it, for the message, such as ``"the merged model"``.
        remedy: A sentence that says what to do.

    Raises:
        OSError: ``ENOSPC``; it has less. The message says both figures.
    """
    available_bytes = shutil.disk_usage(folder).free
    if available_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {format_bytes(needed_bytes)}, {folder} has {format_bytes(available_bytes)} left. {remedy}",
        )


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_occupied(path: Path) -> None:
    """See that a folder can take this name.

    Raises:
        FileExistsError: There is a file, or a folder that is not empty.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(errno.EEXIST, f"{path} exists and is no folder. Give another name for the output")
    if path.is_dir() and (first := next(path.iterdir(), None)) is not None:
        raise FileExistsError(
            errno.EEXIST, f"{path} is not empty (it holds {first.name}). Remove it, or give another name for the output"
        )


class StagedFolder:
    """A folder that gets its name only when all of it is on the disk; a context manager that gives the temporary path.

    Leaving the context by an exception leaves nothing. A killed process leaves its temporary folder; the next writer of
    the same folder removes it.
    """

    def __init__(self, path: Path, needed_bytes: int, what: str) -> None:
        """Say what is to be written; nothing is before the context is entered.

        Args:
            path: The folder's own name. Its parent is made if it does not exist.
            needed_bytes: How much will be written into it.
            what: What it is, for messages.
        """
        self.path = path
        self._needed_bytes = needed_bytes
        self._what = what
        self._partial_path = partial_path(path)
        self._descriptor = -1  # owned: closed in _discard

    def __enter__(self) -> Path:
        """Check names and disk space, and make the temporary folder.

        Raises:
            FileExistsError: The name is taken.
            OSError: There is too little disk space (``ENOSPC``), or the folder cannot be made.
        """
        refuse_occupied(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_partials(self.path)
        remedy = "Free some, or write to another disk"
        require_disk_space(self.path.parent, self._needed_bytes, self._what, remedy)
        self._partial_path.mkdir()
        self._descriptor = os.open(self._partial_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until closed: says that a writer lives
        return self._partial_path

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the folder its name if all went well, else remove what was written."""
        try:
            if exc_type is None:
                for path in sorted(self._partial_path.rglob("*")):
                    sync(path)
                sync(self._partial_path)
                self._partial_path.rename(self.path)  # takes the place of an empty folder, of no other
                sync(self.path.parent)
        finally:
            shutil.rmtree(self._partial_path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1
