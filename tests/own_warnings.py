"""Deprecations that the package or a recipe runs into by its own calls are errors, however a library says them.

A library may warn with a stack level that names itself, or write to its log: pytest's filters by module see neither. So
whoever called the library decides: the first frame of another package below the one that warns. What transformers makes
peft call is no fault of ours, nor is an argument by an old name that a ``forward`` of ours was given and hands on.
"""

from __future__ import annotations

import logging
import sys
import sysconfig
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = {"hf_lema", "recipes"}
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_LIBRARIES = {sysconfig.get_path(name) for name in ("purelib", "platlib")}


def package_of(file: str) -> str | None:
    """Whose a source file is: a package's name, ``hf_lema``, ``recipes``, ``tests``, or None for Python's own."""
    path = Path(file)
    for part, name in zip(path.parts, path.parts[1:], strict=False):  # first: .venv may lie in the root
        if part in ("site-packages", "dist-packages"):
            return name.removesuffix(".py")
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).parts[0]
    return next((path.relative_to(folder).parts[0] for folder in _LIBRARIES if path.is_relative_to(folder)), None)


def is_own_call(frame: FrameType | None) -> bool:
    """Whether the library that the frame is in was called by the package or a recipe."""
    library = None
    while frame is not None:
        package = package_of(frame.f_code.co_filename)
        if library is None:
            library = package
        is_handed_on = package in OURS and frame.f_code.co_name == "forward"
        if package not in (None, library) and not is_handed_on:
            return package in OURS
        frame = frame.f_back
    return False


def install() -> None:
    """Has such deprecations raise, in this process, from here on."""
    plain_warn, plain_factory = warnings.warn, logging.getLogRecordFactory()

    def warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, KINDS) and is_own_call(sys._getframe(1)):
            raise kind(str(message))
        plain_warn(message, category, stacklevel + 1, *args, **kwargs)

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain_factory(*args, **kwargs)
        if "deprecat" in str(record.msg).lower() and is_own_call(_caller_of_logging()):
            raise DeprecationWarning(record.getMessage())
        return record

    warnings.warn = warn
    logging.setLogRecordFactory(factory)


def _caller_of_logging() -> FrameType | None:
    """The frame that logs; `logging` and the factory above are no library's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == logging.__file__:
        frame = frame.f_back
    return frame
