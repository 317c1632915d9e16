"""Reads pickled weights (`.pth`, `.pt`, `.ckpt`, `.bin`) without executing anything in them.

torch's `weights_only` unpickler rebuilds tensors and plain containers; `ALLOWED` lists the few other classes. A file
that names any other class is refused, and there is deliberately no option to trust a file.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from realsr_hpc.files import first_line, other_content

_DTYPES = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
ALLOWED: tuple[Callable[..., object] | tuple[Callable[..., object], str], ...] = (
    argparse.Namespace,  # options of LlamaGen's trainer
    np.dtype,
    *_DTYPES,
    np._core.multiarray.scalar,  # pyright: ignore[reportAttributeAccessIssue]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # its name before NumPy 2  # pyright: ignore[reportAttributeAccessIssue]
)
"""Classes that a file of weights may contain besides tensors and plain containers."""
_REFUSED = torch.serialization.pickle.UnpicklingError  # pyright: ignore[reportPrivateImportUsage]
_NAMED = re.compile(r"(?:GLOBAL|global(?!: GLOBAL)|class(?! <class))\W+([\w.]+)")


def read_pickle(path: Path) -> object:
    """The content of a file; in files of torch >= 1.6, tensors are memory-mapped and read on use.

    ValueError if the file is damaged, or contains a class that is not allowed: the message names it.
    """
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_classes(path)
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _REFUSED as error:
        named = _NAMED.search(str(error))
        if named is None:
            raise _damaged(path, error) from None
        raise ValueError(_refusal(path, [named[1]])) from None
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _check_classes(path: Path) -> None:
    allowed = {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__name__}" for item in ALLOWED}
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError) as error:
        raise _damaged(path, error) from None
    refused = sorted(set(named) - allowed)
    if refused:
        raise ValueError(_refusal(path, refused))


def _refusal(path: Path, classes: list[str]) -> str:
    return (
        f"{path} is a pickle that refers to {', '.join(classes)}; only tensors, plain containers, NumPy scalars and "
        "argparse.Namespace are read, and nothing in it was executed; get the file from its owner, or have its "
        "tensors saved as safetensors"
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    if path.is_file() and (other := other_content(path)):
        return ValueError(f"{path} {other}")
    return ValueError(f"{path} is damaged, or no file of torch.save ({first_line(error)[:160]}); copy it again")
