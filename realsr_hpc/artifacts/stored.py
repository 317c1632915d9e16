"""Records as JSON files: written atomically, validated on reading, NaN stored as null."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BeforeValidator, PlainValidator, Strict, ValidationError

from realsr_hpc.files import Json, adapter, json_value, printable, write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


class Damaged(ValueError):
    """Raised for a file that is missing, truncated, of another kind, or from a newer version; the message names it."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool | str):  # pydantic would make numbers of both
        raise ValueError("must be a number")
    return math.nan if value is None else value


def _whole(value: object) -> object:
    if isinstance(value, bool | str | float):
        raise ValueError("must be a whole number")
    return value


def _inside(value: object) -> str:
    path = PurePosixPath(_text(value))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("must be a path inside the folder")
    return str(value)


Text = Annotated[str, PlainValidator(_text)]
"""A string that may contain lone surrogates, which stand for bytes of file names that are not UTF-8."""
Number = Annotated[float, BeforeValidator(_number)]
"""A float; NaN is stored as null, because JSON has no NaN."""
Whole = Annotated[int, BeforeValidator(_whole)]
Flag = Annotated[bool, Strict()]
Inside = Annotated[str, PlainValidator(_inside)]
"""Path of a file inside the record's folder. Other paths are refused, because records may come from elsewhere."""


def write(path: Path, record: DataclassInstance) -> None:
    """Replace the file."""
    # Escaped to ASCII, because file names may contain bytes that are not UTF-8.
    write_atomically(path, json.dumps(_without_nan(dataclasses.asdict(record)), indent=1))


def read(path: Path, kind: type[T], version: int) -> T:
    """The record in a file. Raises Damaged."""
    return checked(path, load(path), kind, version)


def load(path: Path) -> Json:
    """A file's JSON, not yet checked. Raises Damaged."""
    try:
        return json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from None


def checked(path: Path, content: Json, kind: type[T], version: int) -> T:
    """JSON as a record of at most `version`; unknown keys are ignored. Raises Damaged."""
    written = content.get("version", version) if isinstance(content, dict) else version
    if isinstance(written, int) and written > version:
        raise Damaged(f"{printable(path)}: written in version {written} of its format, this program reads {version}")
    try:
        return adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise Damaged(f"{printable(path)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _without_nan(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
