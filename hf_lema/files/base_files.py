"""What the files of a base model are: told by every byte, so that a run goes on with the model that it began with.

Responsibility: an identity of a checkpoint's files that a copy elsewhere shares and a change anywhere breaks; comparing
it with one that was recorded. Knows nothing of models or of who keeps the record.

The identity of a file is its size and a SHA-256 of its contents: the digest of the digests of its pieces of
`PIECE_BYTES`, which several threads can compute. To read everything costs about one sweep of the disk tier, so it is
done at most once a run, and not at all where the system says that a file was not touched since it was recorded: same
path, inode, size, and times of the last write and of the last change, the second of which no program can set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_lema.files.checkpoint import CheckpointIndex

PIECE_BYTES = 64 * 2**20
NUM_THREADS = 4
_READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class BaseFile:
    """One file as it was when its model was loaded.

    Attributes:
        name: Relative to the checkpoint's folder.
        nbytes: Its size.
        touched: A digest of what the system says of it (path, inode, times in ns): equal means untouched.
    """

    name: str
    nbytes: int
    touched: str


class BaseFiles:
    """The files that a model was loaded from. Nothing stays open.

    Attributes:
        files: In the order of their names.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        """Note how the files are now; reads none.

        Args:
            index: The checkpoint, opened just now.

        Raises:
            FileNotFoundError: A file is gone.
            ValueError: A file has another size than when it was indexed.
        """
        headers = {str(header.path.relative_to(index.folder)): header for header in index.headers}
        self._paths = {name: header.path for name, header in headers.items()}
        self.files = tuple(_look_at(name, path) for name, path in sorted(self._paths.items()))
        if changed := [file.name for file in self.files if file.nbytes != headers[file.name].nbytes]:
            raise ValueError(f"{index.folder}: {', '.join(changed)} changed while the model was loaded. Load it again")
        self._digests: dict[str, str | None] = {}

    def record(self) -> list[dict[str, Any]]:
        """The identity, to be kept as JSON. Reads every file the first time that it is asked, with a progress bar.

        Returns:
            For each file ``name``, ``nbytes``, ``touched`` and ``sha256``, which is None where the file is gone, or is
            not what was loaded any more.
        """
        self._read(self.files)
        return [
            {"name": f.name, "nbytes": f.nbytes, "touched": f.touched, "sha256": self._digests[f.name]}
            for f in self.files
        ]

    @property
    def unidentified(self) -> list[str]:
        """Names of files that were gone or changed when `record` looked."""
        return [name for name, digest in self._digests.items() if digest is None]

    def differences(self, recorded: Sequence[Mapping[str, Any]]) -> list[str]:
        """Compare with a record, and read what the system cannot vouch for.

        Args:
            recorded: What `record` gave, perhaps on another machine.

        Returns:
            What is not as it was, a sentence for each file; empty where all is.
        """
        then = {str(file["name"]): file for file in recorded}
        now = {file.name: file for file in self.files}
        found = [f"{name} was one of its files and is not any more" for name in sorted(then.keys() - now.keys())]
        found += [f"{name} was not one of its files" for name in sorted(now.keys() - then.keys())]
        pairs = [(now[name], then[name]) for name in sorted(then.keys() & now.keys())]
        self._read(file for file, record in pairs if _only_contents_tell(file, record))
        return found + [difference for pair in pairs for difference in self._difference(*pair)]

    def _difference(self, now: BaseFile, then: Mapping[str, Any]) -> list[str]:
        if now.nbytes != then["nbytes"]:
            return [f"{now.name} has {now.nbytes} bytes, had {then['nbytes']}"]
        if now.touched == then["touched"]:
            return []
        if then["sha256"] is None:
            return [f"{now.name} was changed or removed while the run that saved the checkpoint went on"]
        digest = self._digests[now.name]
        if digest is None:
            return [f"{now.name} was changed or removed since it was loaded"]
        if digest != then["sha256"]:
            return [f"{now.name} has other contents (sha256 {digest[:12]}..., was {then['sha256'][:12]}...)"]
        return []

    def _read(self, files: Iterable[BaseFile]) -> None:
        """Takes the digests of those that were not read yet."""
        files = [file for file in files if file.name not in self._digests]
        num_bytes = sum(file.nbytes for file in files)
        with tqdm(
            total=num_bytes, desc="Reading the base model", unit="B", unit_scale=True, delay=2, leave=False
        ) as bar:
            for file in files:
                self._digests[file.name] = self._digest(file, bar.update)

    def _digest(self, file: BaseFile, on_read: Callable[[int], object]) -> str | None:
        """Of the contents, if they are still those that were loaded."""
        path = self._paths[file.name]
        try:
            digest = _digest_of(path, file.nbytes, on_read)
            is_as_loaded = _look_at(file.name, path) == file
        except OSError:  # gone, or on a disk that is: the run that streams from RAM goes on all the same
            return None
        return digest if is_as_loaded else None


def _look_at(name: str, path: Path) -> BaseFile:
    path = path.resolve()
    found = path.stat()
    # As a digest: the record goes where checkpoints go, to the hub too, and a path says more than it should.
    seen = json.dumps([str(path), found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    return BaseFile(name=name, nbytes=found.st_size, touched=hashlib.sha256(seen.encode()).hexdigest())


def _only_contents_tell(now: BaseFile, then: Mapping[str, Any]) -> bool:
    """Whether a file has to be read to know if it is the recorded one."""
    return now.nbytes == then["nbytes"] and now.touched != then["touched"] and then["sha256"] is not None


def _digest_of(path: Path, nbytes: int, on_read: Callable[[int], object]) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def piece(begin: int) -> bytes:
            digest, end = hashlib.sha256(), min(begin + PIECE_BYTES, nbytes)
            while begin < end and (read := os.pread(descriptor, min(_READ_BYTES, end - begin), begin)):
                digest.update(read)
                begin += len(read)
            return digest.digest()

        begins, digest = range(0, nbytes, PIECE_BYTES), hashlib.sha256()
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="hf_lema-digest") as pool:
            for begin, of_piece in zip(begins, pool.map(piece, begins), strict=True):
                digest.update(of_piece)
                on_read(min(PIECE_BYTES, nbytes - begin))
        return digest.hexdigest()
    finally:
        os.close(descriptor)
