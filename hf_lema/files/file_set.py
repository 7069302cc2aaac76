"""Reading byte ranges of files into memory that the caller owns.

Responsibility: read-only file descriptors, positioned reads that are complete or an error. Knows nothing of tensors,
of what the bytes mean, or of where the memory goes next. Linux only (``os.preadv``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ReadSpan:
    """A run of bytes in a file that lies as one run in a layer's buffer, too.

    Attributes:
        path: The file.
        file_offset_bytes: Where the run starts in the file.
        nbytes: Its length.
        layer_offset_bytes: Where it starts in the layer's buffer.
    """

    path: Path
    file_offset_bytes: int
    nbytes: int
    layer_offset_bytes: int


class FileSet:
    """Owns one read-only descriptor for each of a fixed set of files, opened at first use.

    Any number of threads may read at once. ``close()`` may come while reads are in flight in other threads: later reads
    are refused, those in flight finish, and the last of them closes the descriptors (a descriptor number that was
    closed under a read could already belong to another file).
    """

    def __init__(self, sizes_bytes: Mapping[Path, int]) -> None:
        """Remember the files; opens none.

        Args:
            sizes_bytes: Path -> size in bytes that the file had when it was indexed.
        """
        self._sizes_bytes = dict(sizes_bytes)
        self._lock = threading.Lock()
        self._modified_ns: dict[Path, int] = {}  # when each was opened
        self._descriptors: dict[Path, int] = {}  # owned: closed in _close_descriptors and nowhere else
        self._num_reading = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._closed

    def open_all(self) -> dict[Path, int]:
        """Open every file now, so that a file replaced later is not mixed with what was opened before.

        Returns:
            Path -> descriptor, still owned by this set.

        Raises:
            ValueError: A file's size is no longer what it was when indexed.
            FileNotFoundError: A file is gone.
            RuntimeError: The set is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the files are closed")
            for path in self._sizes_bytes:
                if path not in self._descriptors:
                    self._descriptors[path] = self._open(path)
            return dict(self._descriptors)

    def pread_into(self, path: Path, file_offset_bytes: int, out: memoryview) -> None:
        """Fill ``out`` from the file, from the given position on. Releases the GIL while it reads.

        Args:
            path: One of the files given at construction.
            file_offset_bytes: Where to start.
            out: Writable, contiguous bytes; all of it is filled.

        Raises:
            ValueError: The file is not in this set, its size is no longer what it was when indexed, or it ends early.
            FileNotFoundError: The file is gone.
            OSError: The system refused to open or to read; the message names the file and the place.
            RuntimeError: The set is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the files are closed: cannot read {path}")
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                descriptor = self._descriptors[path] = self._open(path)
            self._num_reading += 1
        try:
            num_read = 0
            while num_read < len(out):
                got = _preadv(path, descriptor, out[num_read:], file_offset_bytes + num_read)
                if got == 0:
                    raise ValueError(
                        f"{path} ended early: wanted {len(out)} bytes at offset {file_offset_bytes}, got {num_read}. "
                        "The file was cut while in use: fetch it again"
                    )
                num_read += got
            self._refuse_rewritten(path, descriptor)
        finally:
            with self._lock:
                self._num_reading -= 1
                if self.closed and self._num_reading == 0:
                    self._close_descriptors()

    def _open(self, path: Path) -> int:
        expected_bytes = self._sizes_bytes.get(path)
        if expected_bytes is None:
            raise ValueError(f"{path} is not one of the {len(self._sizes_bytes)} files of this set")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes != expected_bytes:
            os.close(descriptor)
            raise ValueError(
                f"{path} has {found_bytes} bytes, but had {expected_bytes} when it was indexed: it was replaced or cut "
                "since. Load the model again"
            )
        self._modified_ns[path] = os.fstat(descriptor).st_mtime_ns
        return descriptor

    def _refuse_rewritten(self, path: Path, descriptor: int) -> None:
        if os.fstat(descriptor).st_mtime_ns != self._modified_ns[path]:
            raise ValueError(
                f"{path} was written to while it was in use: what was read may be a mixture of old and new bytes. "
                "Leave the files of a model alone while it is streamed, and load it again"
            )

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def close(self) -> None:
        """Close the descriptors. May be called any number of times, from any thread."""
        with self._lock:
            self._closed = True
            if self._num_reading == 0:
                self._close_descriptors()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _preadv(path: Path, descriptor: int, out: memoryview, file_offset_bytes: int) -> int:
    try:
        return os.preadv(descriptor, [out], file_offset_bytes)
    except OSError as error:
        # The system's own error for a descriptor names no file.
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} at offset {file_offset_bytes}. The disk could not be read: copy the "
            "model to another one, or fetch it again",
            str(path),
        ) from error


def merge_spans(spans: Iterable[ReadSpan]) -> tuple[ReadSpan, ...]:
    """Join spans that follow one another in the file and in the buffer, so that one read does for all of them.

    Args:
        spans: Of one layer, in any order.

    Returns:
        The same bytes in as few spans, in the order of the layer's buffer. Empty spans are dropped.
    """
    merged: list[ReadSpan] = []
    for span in sorted((span for span in spans if span.nbytes), key=lambda span: span.layer_offset_bytes):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.path == span.path
            and last.file_offset_bytes + last.nbytes == span.file_offset_bytes
            and last.layer_offset_bytes + last.nbytes == span.layer_offset_bytes
        ):
            merged[-1] = ReadSpan(
                path=last.path,
                file_offset_bytes=last.file_offset_bytes,
                nbytes=last.nbytes + span.nbytes,
                layer_offset_bytes=last.layer_offset_bytes,
            )
        else:
            merged.append(span)
    return tuple(merged)


def read_spans_into(files: FileSet, spans: Iterable[ReadSpan], out: torch.Tensor) -> None:
    """Fill a layer's buffer from the spans that make it up. Bytes between the spans are left as they are.

    Args:
        files: Open files that hold the spans.
        spans: What to read; several threads may share one layer's spans among them.
        out: 1-D contiguous CPU uint8 tensor; the layer begins at its first byte.

    Raises:
        ValueError: The buffer is not such a tensor or too short; a file was replaced or ends early (the message names
            the file, the place in the layer, the bytes wanted and got).
        FileNotFoundError: A file is gone.
        RuntimeError: ``files`` is closed.
    """
    if out.device.type != "cpu" or out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
        raise ValueError(f"expected a 1-D contiguous uint8 tensor on the CPU, got {out.dtype} {tuple(out.shape)}")
    memory = out.numpy().data
    for span in spans:
        end_bytes = span.layer_offset_bytes + span.nbytes
        if end_bytes > len(memory):
            raise ValueError(f"{span} ends at byte {end_bytes} of the layer, the buffer has {len(memory)} bytes")
        try:
            files.pread_into(span.path, span.file_offset_bytes, memory[span.layer_offset_bytes : end_bytes])
        except ValueError as error:
            raise ValueError(f"bytes {span.layer_offset_bytes} to {end_bytes} of the layer: {error}") from error
