"""Reads existing notes about photographs from files: captions, tags, splits and partners.

A note is one of:
- a line of one JSON-lines file, with a `path` relative to the source or a `key`;
- `<image>.json` beside a photograph;
- in a tar, the `.json` or `.txt` member with the photograph's name.

An invalid note in the first two places is reported with file and line, and its photograph is left out, because its
split may matter. The JSON in a tar often comes from elsewhere: unknown fields are ignored, invalid fields are ignored
and reported, and a single `caption` is used for all three. An `<image>.json` that has no captions but fields unknown
here belongs to another program: it is ignored and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypedDict, cast

from realsr_hpc.data.manifest import caption_fault
from realsr_hpc.files import printable
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES


class Note(TypedDict, total=False):
    """What a note tells about a photograph. Every field may be missing; captions come all three or not at all."""

    key: str
    path: str
    """Of the photograph, relative to the source."""
    split: str
    caption_rough: str
    caption_middle: str
    caption_final: str
    tags: list[str]
    lq_path: str
    """Of the low-quality partner, relative to the source."""
    source: str


CAPTIONS = tuple(f"caption_{name}" for name in IMAGE_NAMES)
FIELDS = frozenset(Note.__annotations__)


class WrongNote(ValueError):
    """A note that cannot be used. The message gives the reason, not the place."""


@dataclass(frozen=True)
class Notes:
    """The notes of a JSON-lines file, by the path or key that each line names."""

    told: Mapping[str, Note] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    """By path or key: place and reason of each note that cannot be used."""
    nameless: Mapping[str, str] = field(default_factory=dict)
    """By place: reason for each line that names no photograph, or one that an earlier line names."""
    places: Mapping[str, str] = field(default_factory=dict)
    """By path or key: file and line."""

    def name_of(self, *names: str) -> str | None:
        """The first of these names that has a note, else None."""
        return next((name for name in names if name in self.places), None)

    def unused(self, known: Iterable[str]) -> dict[str, str]:
        """By place: reason for each note about a photograph that does not exist.

        Raises:
            ValueError: if no note is about one of the photographs.
        """
        known = set(known)
        unused = [name for name in self.places if name not in known]
        if unused and len(unused) == len(self.places):
            raise ValueError(f"captions describe {unused[:5]}, not found below source; correct path or key")
        return {self.places[name]: f"note: {printable(name)} is not below source" for name in unused}


def captions_of(note: Note) -> tuple[str, str, str]:
    """The rough, middle and final caption of a note; empty if it has none."""
    return note.get("caption_rough", ""), note.get("caption_middle", ""), note.get("caption_final", "")


def read_notes(path: Path) -> Notes:
    """Notes of a JSON-lines file; invalid lines are kept with their reasons.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        # Not `splitlines`, which also splits at U+2028 and other characters that JSON allows inside a string.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"captions={path} cannot be read ({error.strerror}); name a file of JSON lines") from None
    told: dict[str, Note] = {}
    wrong: dict[str, str] = {}
    nameless: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            raw = _parsed(line)
            name = _name_in(raw)
            if name in places:
                raise WrongNote(f"{printable(name)} has one already, at {places[name]}")
        except WrongNote as error:
            nameless[place] = f"note: {error}"
            continue
        places[name] = place
        try:
            told[name] = _checked(raw)
        except WrongNote as error:
            wrong[name] = f"note: {place}: {error}"
    return Notes(told, wrong, nameless, places)


def _name_in(raw: Mapping[str, object]) -> str:
    """The path, else the key, of a line."""
    for field_name in ("path", "key"):
        if isinstance(name := raw.get(field_name), str) and name:
            return name
    raise WrongNote("neither path nor key; name the photograph it describes")


def note_beside(path: Path) -> tuple[Note, bool]:
    """The note in `<image>.json` (empty if there is no such file), and whether the file belongs to another program.

    Raises:
        WrongNote: naming the file, if it is a note but invalid, or not JSON.
    """
    file = path.with_name(path.name + ".json")
    if not os.path.isfile(file):  # not Path's, which raises in a folder that is closed: the photograph says so
        return {}, False
    try:
        raw = _parsed(file.read_bytes())
        if not set(CAPTIONS) & raw.keys() and set(raw) - FIELDS:
            return {}, True
        return _checked(raw), False
    except (WrongNote, OSError) as error:
        raise WrongNote(f"note: {file.name}: {error}") from None


def note_in_tar(content: bytes, ending: str) -> tuple[Note, list[str]]:
    """The note in a tar member (`.txt` or JSON), and the reasons why parts of it were ignored or changed."""
    if ending == ".txt":
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
        raw: dict[str, object] = {"caption": text} if text.strip() else {}
    else:
        try:
            raw = _parsed(content)
        except WrongNote as error:
            return {}, [str(error)]
    note: dict[str, object] = {}
    faults = []
    for name in sorted(raw.keys() & (FIELDS - {"key", "path", "lq_path"} | {"caption"})):
        if fault := _type_fault(name, raw[name]):
            faults.append(fault)
        elif raw[name]:
            note[name] = raw[name]
    lone = note.pop("caption", None)
    given = {name: str(note.pop(name)) for name in CAPTIONS if name in note}
    texts = given if len(given) == len(CAPTIONS) else {name: str(lone) for name in CAPTIONS if lone}
    if given and not texts:
        faults.append("some of the three captions; give all of them or none")
    if caption_fault(texts.values()):
        faults.append("marks of a trace taken out of its captions")
    return cast(Note, note | {name: plain(text) for name, text in texts.items() if plain(text)}), faults


def plain(text: str) -> str:
    """The text on one line, without characters that would end a field of the trace."""
    return " ".join("".join(" " if caption_fault([mark]) else mark for mark in text).split())


def _parsed(content: bytes) -> dict[str, object]:
    """A JSON object without the fields that are null."""
    try:
        raw = json.loads(content.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise WrongNote(f"no JSON in UTF-8 ({error})") from None
    if not isinstance(raw, dict):
        raise WrongNote(f"a JSON {type(raw).__name__}, not an object with fields")
    return {name: value for name, value in raw.items() if value is not None}


def _checked(raw: Mapping[str, object]) -> Note:
    """The fields of a line as a note; WrongNote with the first fault."""
    unknown = sorted(set(raw) - FIELDS)
    if unknown:
        raise WrongNote(f"the unknown fields {unknown}; known: {sorted(FIELDS)}")
    faults = [fault for name, value in raw.items() if (fault := _type_fault(name, value))]
    if faults:
        raise WrongNote(faults[0])
    captions = {name: " ".join(str(raw[name]).split()) for name in CAPTIONS if name in raw}
    if any(captions.values()) and not (len(captions) == len(CAPTIONS) and all(captions.values())):
        raise WrongNote("some of the three captions; give all of them or none")
    if fault := caption_fault(captions.values()):
        raise WrongNote(fault)
    if "key" in raw and not sound_name(str(raw["key"])):
        raise WrongNote(f"key is {raw['key']!r}: leave out '..', a leading '/' and control characters")
    return cast(Note, {**raw, **captions})


def _type_fault(name: str, value: object) -> str | None:
    """Why a field's value cannot be used, or None."""
    if value is None:
        return None
    given = [value] if name != "tags" else value if isinstance(value, list) else [None]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        wanted = 'a list of texts such as ["house"]' if name == "tags" else "a text"
        return f"{name} is {json.dumps(value)[:60]}; give {wanted}"
    if name not in ("path", "lq_path") and printable("".join(texts)) != "".join(texts):
        return f"{name} holds half of a character (a lone surrogate); write it again"
    if name == "split" and not str(value).isprintable():
        return f"split is {json.dumps(value)[:60]}; give a word such as train or heldout"
    return None


def sound_name(name: str) -> bool:
    """Whether a key or the name of a tar member stays inside its folder (no `..`, not absolute)."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and name.isprintable()
