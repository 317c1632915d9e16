"""`realsr-hpc COMMAND ...`: all commands of the project; `python tools/COMMAND.py` in a checkout does the same.

Each module here is one command with `main(arguments) -> int`. A command is imported only when it is called, and has
slow imports inside its functions, so that help is immediate and submitting a run does not import torch.
"""

from __future__ import annotations

import atexit
import codecs
import difflib
import gc
import importlib
import io
import locale
import os
import sys
from collections.abc import Callable, Sequence

from realsr_hpc import __version__

COMMANDS = {
    "demo": "the whole system in minutes on a CPU, one command after another",
    "launch": "run, plan or sweep a recipe, locally or on Slurm",
    "jobs": "list runs with their states and logs; cancel, resume or follow one",
    "compare": "compare runs: tables, curves and images",
    "prepare-data": "turn folders of photographs or WebDataset tars into a checked manifest",
    "degrade": "degrade photographs as training does, for inspection or testing",
    "stage-weights": "list the files a recipe needs; collect, check and pack them",
    "freeze-traces": "tokenise VLCoT traces once, for SFT without images",
    "make-scenes": "generate the shapes and signs that sft_tiny trains on in addition to photographs",
    "carry-over": "adapt a trained policy to the tokenizers of another recipe, as start weights",
    "fit-experts": "make and measure the small quality experts of the generation reward",
    "score": "score a folder of images with metrics or rewards",
    "serve-rewards": "serve a recipe's rewards to runs elsewhere",
    "evaluate": "measure a run, an export or finished images on a test set",
    "restore": "restore images, with the model's reasoning",
    "replay": "recompute a saved GRPO step, optionally with another clip, weight or layout",
    "gallery": "one HTML page of rollouts, rewards, evaluations and restored images",
    "export-hf": "export a run to a Hugging Face folder",
    "import-weights": "convert public weights to start weights of a recipe",
    "import-hf": "renamed to import-weights",
    "nemo-archive": "convert an export to a NeMo archive and back",
    "sync-tracking": "send to MLflow what runs logged while it was unreachable",
}
"""Description of each command, in the order in which a project uses them."""
RENAMED = {"make-shapes": "make-scenes"}
"""Names of commands in earlier versions, with their present names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, or 2 for an unknown command."""
    if arguments is None:
        _use_utf8()
        atexit.register(gc.freeze)  # else Python's garbage collection at exit takes seconds
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"realsr-hpc {__version__}")
        return 0
    name = words[0].replace("_", "-")
    if name not in COMMANDS:
        if name in RENAMED:
            print(f"{name} is now called {RENAMED[name]}: realsr-hpc {RENAMED[name]} --help", file=sys.stderr)
            return 2
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        print(f"unknown command {words[0]!r}; {hint}commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return _answered(importlib.import_module(f"realsr_hpc.commands.{name.replace('-', '_')}").main, words)


def _answered(command: Callable[[list[str]], int], words: list[str]) -> int:
    """Run a command. OSErrors and Ctrl-C print one line instead of a traceback, with exit codes 2 and 130."""
    try:
        code = command(words[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards buffered output
        return 1
    except OSError as error:
        if error.strerror is None:  # raised by a library, not by the system
            raise
        from realsr_hpc.files import printable

        named = " -> ".join(repr(printable(os.fsdecode(name))) for name in (error.filename, error.filename2) if name)
        print(f"{words[0]}: {named + ': ' if named else ''}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{words[0]}: stopped by Ctrl-C; the same command continues it, or starts it over", file=sys.stderr)
        return 130


def _use_utf8() -> None:
    """If the locale has another encoding, restart this program, and so its children, in Python's UTF-8 mode.

    Otherwise file names outside ASCII would contain lone surrogates, which Parquet, JSON and MLflow refuse.
    """
    if codecs.lookup(locale.getencoding()).name != "utf-8" and not sys.flags.utf8_mode:
        words = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):  # file names that are not valid UTF-8 are shown with escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def usage() -> str:
    """Help text with one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: realsr-hpc COMMAND [key=value ...]    (realsr-hpc COMMAND --help: its keys)", "", *lines])
