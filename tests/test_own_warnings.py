"""A deprecated call from the package or from a recipe raises; one that a library makes of another does not."""

from __future__ import annotations

import logging
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_warnings import ROOT, package_of

SITE = Path(sysconfig.get_path("purelib"))
LIBRARY, OTHER = SITE / "library" / "x.py", SITE / "other" / "y.py"
WARNS = "import warnings\ndef f(): warnings.warn('f is deprecated', FutureWarning{})"
LOGS = "import logging\ndef f(): logging.getLogger('library').warning('%s is deprecated', 'f')"
WAYS = [WARNS.format(""), WARNS.format(", stacklevel=2"), WARNS.replace("Future", "Deprecation").format(""), LOGS]


def function(path: Path, source: str, **names: Any) -> Callable[[], None]:
    """The function ``f`` of a source, as if it stood in that file."""
    space = {"__name__": path.stem, **names}
    exec(compile(source, str(path), "exec"), space)
    return space["f"]


def caller(path: Path, called: Callable[[], None]) -> Callable[[], None]:
    return function(path, "def f(): g()", g=called)


@pytest.mark.parametrize(
    "ours", [ROOT / "hf_lema" / "files" / "x.py", ROOT / "recipes" / "x.py"], ids=lambda p: p.parent.name
)
@pytest.mark.parametrize("way", WAYS)
def test_a_deprecated_call_of_ours_raises(ours: Path, way: str) -> None:
    with pytest.raises((FutureWarning, DeprecationWarning), match="f is deprecated"):
        caller(ours, function(LIBRARY, way))()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_library_or_a_test_calls_is_only_a_warning(way: str) -> None:
    ours = ROOT / "hf_lema" / "x.py"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caller(ours, caller(OTHER, function(LIBRARY, way)))()
        function(LIBRARY, way)()


def test_a_forward_of_ours_hands_on_what_it_was_given() -> None:
    forward = function(
        ROOT / "hf_lema" / "x.py", "def forward(): g()\ndef f(): forward()", g=function(LIBRARY, WAYS[0])
    )
    with pytest.raises(FutureWarning):
        forward()
    with pytest.warns(FutureWarning):
        caller(
            OTHER, function(ROOT / "hf_lema" / "x.py", "def forward(): g()\nf = forward", g=function(LIBRARY, WAYS[0]))
        )()


def test_other_warnings_and_logs_of_our_calls_pass() -> None:
    source = "import warnings\ndef f(): warnings.warn('look out')"
    with pytest.warns(UserWarning, match="look out") as caught:
        caller(ROOT / "hf_lema" / "x.py", function(LIBRARY, source))()
    assert caught[0].filename == str(LIBRARY)  # the level counts as it did
    logging.getLogger("library").warning("nothing is wrong")


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_python_itself_says_of_our_modules_is_an_error_too(kind: type[Warning]) -> None:
    """From C the hook is not asked; there pytest's filter by module counts."""
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "x.py", 1, module="hf_lema.files.pack")
    with warnings.catch_warnings(record=True):
        warnings.warn_explicit("old", kind, "x.py", 1, module="other.files.pack")


def test_files_are_told_by_their_package() -> None:
    assert package_of(str(LIBRARY)) == "library"
    assert package_of(str(ROOT / "hf_lema" / "files" / "pack.py")) == "hf_lema"
    assert package_of(__file__) == "tests"
    assert package_of(str(ROOT / ".venv" / "lib" / "python3.11" / "site-packages" / "library" / "x.py")) == "library"
    assert package_of(logging.__file__) is None
