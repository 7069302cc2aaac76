"""The addresses of this repository in README and notebooks, written from the one place that knows: setup.cfg's ``url``.

    python recipes/badges.py            writes README's badges and the notebooks' REPOSITORY
    python recipes/badges.py --check    1 where they are not what setup.cfg says

Without a ``url`` nothing can open a notebook in a browser tab by itself: README then says how it is opened by hand.
Knows setup.cfg, Markdown and the notebook format. A test runs --check.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- badges: python recipes/badges.py -->", "<!-- /badges -->"
NOTEBOOKS = {
    "quickstart_colab_t4": ("Colab", "a 7B model on Colab's T4: plan, train, watch, generate, merge"),
    "finetune_kaggle_p100": (
        "Kaggle",
        "the reply format on Llama-2-7B in fp16 on Kaggle's P100; goes on in a new session",
    ),
    "duel_kaggle_t4x2": ("Kaggle", "stock PEFT, QLoRA and hf_lema on Kaggle's T4, then one training on both cards"),
}
"""Name -> (where it is meant to be opened, what it does)."""
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")


def repository_url(root: Path = ROOT) -> str:
    """``url`` of setup.cfg, or ""."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    return config.get("metadata", "url", fallback="").strip()


def badges(url: str) -> str:
    """README's block: one line for each notebook, with a badge where there is an address that Colab and Kaggle take."""
    match = _GITHUB.fullmatch(url)
    lines = []
    for name, (place, about) in NOTEBOOKS.items():
        path = f"notebooks/{name}.ipynb"
        lines.append(f"- [{path}]({path}): {about}{'.' if match is None else f' {_badge(match[1], path, place)}'}")
    if match is None:
        lines += [
            "",
            "To open one: in Colab *File > Upload notebook*, in Kaggle *Create > New notebook*, then *File > Import "
            "notebook*; say in",
            "its parameters where to clone this repository from (`REPOSITORY`). A `url` in setup.cfg and `python "
            "recipes/badges.py`",
            "turn these lines into badges that open them, and fill that parameter.",
        ]
    return "\n".join(lines)


def _badge(repository: str, path: str, place: str) -> str:
    if place == "Colab":
        image = "https://colab.research.google.com/assets/colab-badge.svg"
        target = f"https://colab.research.google.com/github/{repository}/blob/main/{path}"
    else:
        image = "https://kaggle.com/static/images/open-in-kaggle.svg"
        target = f"https://kaggle.com/kernels/welcome?src=https://github.com/{repository}/blob/main/{path}"
    return f"[![Open in {place}]({image})]({target})"


def with_badges(text: str, url: str) -> str:
    """README's text with its block written anew.

    Raises:
        ValueError: It has no such block, or more than one.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected one block between {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{badges(url)}\n{END}{rest.split(END)[1]}"


def with_repository(notebook_text: str, url: str) -> str:
    """A notebook's text with its REPOSITORY parameter set.

    Raises:
        ValueError: It has no such parameter, or more than one.
    """
    line = re.compile(r'"REPOSITORY = \\"[^"\\]*\\"')
    if len(line.findall(notebook_text)) != 1:
        raise ValueError('expected one line REPOSITORY = "..." in the parameters of the notebook')
    return line.sub(lambda _: json.dumps(f'REPOSITORY = "{url}"')[:-1], notebook_text)


def main(argv: list[str] | None = None) -> int:
    """Writes, or checks, all files; returns 1 where a check finds one that is not up to date."""
    parser = argparse.ArgumentParser(description="write the repository's address into README and notebooks")
    parser.add_argument("--check", action="store_true", help="write nothing, say what would change")
    args = parser.parse_args(argv)
    url, stale = repository_url(), []
    for path in (ROOT / "README.md", *(ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS)):
        text = path.read_text(encoding="utf-8")
        wanted = (with_badges if path.suffix == ".md" else with_repository)(text, url)
        if wanted != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(wanted, encoding="utf-8")
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
