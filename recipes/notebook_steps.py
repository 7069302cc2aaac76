"""The steps of the notebooks: set-up, commands with their output in the cell, a session's end, a run that goes on.

Knows pip, git, processes and IPython's display. Imports neither torch nor hf_lema until a notebook has a torch that its
card can use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
CHECKOUT = RECIPES.parent
EXIT_INTERRUPTED = 130
QUIET = "ignore::FutureWarning"
"""Warnings of libraries that are addressed to programmers."""
STOP_WAIT_S = 900.0
"""After the signal a recipe ends its step and writes a checkpoint; a step of 7B from disk takes minutes."""


class StepFailed(RuntimeError):
    """A command of the notebook ended with an error; its output stands above."""


def set_up(*extras: str) -> None:
    """Installs the package from its checkout; the torch that is there stays as it is.

    Where hf_lema can be imported from this checkout already (an editable install, a test), nothing is installed.
    Also hides what libraries tell programmers (`QUIET`).
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")  # a bar of text does as well
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for an inference kernel
    found = importlib.util.find_spec("hf_lema")
    if found is not None and found.origin is not None and Path(found.origin).parent.parent == CHECKOUT:
        print("hf_lema is installed from this checkout.")
        return
    what = f"{CHECKOUT}[{','.join(extras)}]" if extras else str(CHECKOUT)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"
        # Whatever a package asks for: another torch is gigabytes, and Colab's and Kaggle's are built for their cards.
        kept.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(kept), what], check=True)
    importlib.invalidate_caches()
    print(f"hf_lema {importlib.metadata.version('hf_lema')} is installed; torch was kept.")


def ensure_kernels() -> None:
    """Checks ``torch.cuda.get_arch_list()`` against the card, and installs a torch that has kernels for it.

    Raises:
        SystemExit: One was installed and this session has loaded the other: it must be restarted.
    """
    before = importlib.metadata.version("torch")
    run("torch_for_card.py", "--install")
    importlib.invalidate_caches()
    after = importlib.metadata.version("torch")
    if after == before:
        return
    if "torch" in sys.modules:
        raise SystemExit(f"torch {after} is installed: restart the session and run all cells again.")
    print(f"torch {after} is installed. Restart the session if anything before this cell has imported torch.")


def require_gpu(how: str, needed: bool = True) -> None:
    """Ends the notebook with one sentence where there is no GPU.

    Args:
        how: Where one is switched on.
        needed: False lets the notebook go on, for a small run on the CPU.

    Raises:
        SystemExit: There is none.
    """
    if needed and not (Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()):
        raise SystemExit(f"This notebook needs a GPU and this session has none: {how}, then run all cells again.")


def run(script: str, *arguments: str, **options: object) -> int:
    """Runs a recipe (``x.py``) or a module's command line (``hf_lema``) and shows its output line by line.

    Args:
        script: File name in ``recipes/``, or the name of a module.
        *arguments: Of the command.
        **options: Of `run_command`.

    Returns:
        0, or the status of a recipe that was stopped and can go on.

    Raises:
        StepFailed: It ended with an error.
    """
    program = [str(RECIPES / script)] if script.endswith(".py") else ["-m", script]
    return run_command([sys.executable, "-u", *program, *arguments], **options)  # type: ignore[arg-type]


def run_command(
    command: Sequence[str],
    *,
    limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[], object] = lambda: None,
    allowed: Sequence[int] = (0,),
) -> int:
    """Runs a command; its output goes to the cell, both streams in one.

    Args:
        command: Program and arguments.
        limit_s: After so long it is sent SIGTERM, once; a recipe that can go on ends its step and keeps a checkpoint.
        environment: Variables that are set for it.
        on_line: Called after each line, to draw.
        allowed: Exit statuses that are no error.

    Returns:
        The exit status.

    Raises:
        StepFailed: It ended with another status.
    """
    # Recipes are imported from their folder and the package from its checkout, whatever is installed.
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}
    variables.setdefault("PYTHONWARNINGS", QUIET)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=variables | dict(environment or {}),
        start_new_session=True,  # an interrupt of the cell comes once, from here
    )
    timers = [] if limit_s is None else [threading.Timer(limit_s, process.send_signal, (signal.SIGTERM,))]
    timers += [] if limit_s is None else [threading.Timer(limit_s + STOP_WAIT_S, process.kill)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    assert process.stdout is not None, "started with a pipe"
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            on_line()
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        status = process.wait(STOP_WAIT_S)
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:
            process.kill()
    if status not in allowed:
        raise StepFailed(f"{Path(command[2]).name} ended with status {status}; the lines above say why")
    return status


def options_to_go_on(output_dir: str, previous_output: str = "") -> list[str]:
    """``["--resume"]`` where a run lies in a folder, or in that of an earlier session, which is then copied; else none.

    Args:
        output_dir: Of the recipe.
        previous_output: Folder with the output of an earlier session, read-only on Kaggle; "" for none.

    Raises:
        ValueError: ``previous_output`` is given and holds no run.
    """
    from hf_lema import last_whole_checkpoint  # in the notebook only now: with the torch that the card needs

    folder = Path(output_dir)
    if previous_output and not (folder / "settings.json").exists():
        if not (Path(previous_output) / "settings.json").is_file():
            raise ValueError(f"{previous_output} holds no settings.json: it is not the output folder of a run")
        shutil.copytree(previous_output, folder, dirs_exist_ok=True)
        print(f"Took over the run in {previous_output}.")
    has_checkpoint = last_whole_checkpoint(folder / "checkpoints") is not None
    if (folder / "settings.json").exists() and not has_checkpoint:
        print("The run that lies here has no whole checkpoint: it begins anew.")
        shutil.rmtree(folder)
    return ["--resume"] if has_checkpoint else []


def is_finished(output_dir: str) -> bool:
    """Whether a recipe's run has reached its end: its results are there."""
    return (Path(output_dir) / "results.json").is_file()


def show_files(*paths: str | Path) -> None:
    """Shows Markdown files and pictures in the cell, in the order given; one that is not there is left out."""
    from IPython.display import Image, Markdown, display

    for path in map(Path, paths):
        if path.suffix == ".png" and path.is_file():
            display(Image(data=path.read_bytes(), width=720))
        elif path.is_file():
            display(Markdown(path.read_text(encoding="utf-8")))


def read_json(path: str | Path) -> dict[str, object]:
    """A record of a recipe."""
    record: dict[str, object] = json.loads(Path(path).read_text(encoding="utf-8"))
    return record
