"""Writes the tables of measured figures: README's overview of the duels, and all of them in docs/measured.md.

    python recipes/readme_table.py            prints them
    python recipes/readme_table.py --write    puts them into README.md and docs/measured.md
    python recipes/readme_table.py --check    exit code 1 where these have others

Nothing between the two marks of a page is by hand: all is made from the records in results/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from duel_overview import overview
from measured_tables import ROOT, record_files, tables

PAGES: dict[Path, Callable[[Iterable[Path]], str]] = {
    ROOT / "README.md": overview,
    ROOT / "docs" / "measured.md": tables,
}
BEGIN = "<!-- measured: made by python recipes/readme_table.py --write, not by hand -->"
END = "<!-- measured: end -->"


def with_tables(page: str, made: str) -> str:
    """The text of a page with these tables between its marks.

    Raises:
        ValueError: It has not each mark once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must have one line {BEGIN!r} and after it one line {END!r}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints, writes or checks the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description="make the tables of measured figures from recipes/results/")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="put them into README.md and docs/measured.md")
    choice.add_argument("--check", action="store_true", help="exit code 1 where these have others")
    args = parser.parse_args(argv)
    code, files = 0, record_files()
    for path, make in PAGES.items():
        made = make(files)
        if not args.write and not args.check:
            print(f"{path.name}:\n\n{made}\n")
            continue
        before = path.read_text(encoding="utf-8")
        after = with_tables(before, made)
        if args.write:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            print(f"{path.name} has other figures than recipes/results/: python recipes/readme_table.py --write")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
