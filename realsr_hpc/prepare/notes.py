"""Reads existing notes about photographs from files: captions, tags, splits and partners.

One JSON-lines file for all (a `path` relative to the source, or a `key`, in each line), `<image>.json` beside a
photograph, or in a tar the member of the same name with `.json` or `.txt`. A wrong note of our own is named with file
and line, and its photograph left out: its split may matter. In a tar's JSON, which is often somebody else's, unknown
fields are passed over, wrong ones too but named, and a lone `caption` stands for the three. `<image>.json` without
captions and with fields we do not know is another program's: passed over, and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from realsr_hpc.data.manifest import caption_fault
from realsr_hpc.files import printable
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

Note = dict[str, Any]
CAPTIONS = tuple(f"caption_{name}" for name in IMAGE_NAMES)
FIELDS = frozenset({"key", "path", "split", *CAPTIONS, "tags", "lq_path", "source"})


class WrongNote(ValueError):
    """A note that cannot be used. The message gives the reason, not the place."""


@dataclass
class Notes:
    """The notes of a JSON-lines file, by the path or key that each names."""

    told: dict[str, Note] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    """Place and reason, by path or key, of notes that cannot be used."""
    nameless: dict[str, str] = field(default_factory=dict)
    """Reason, by place, of lines that name no photograph, or one that an earlier line named."""
    places: dict[str, str] = field(default_factory=dict)
    """File and line, by path or key."""

    def name_of(self, *names: str) -> str | None:
        """The first of these names for which there is a note, else None."""
        return next((name for name in names if name in self.places), None)

    def unused(self, known: Iterable[str]) -> dict[str, str]:
        """Reason, by place, for each note about a photograph that is not there.

        Raises:
            ValueError: if no note is about one of the photographs.
        """
        known = set(known)
        unused = [name for name in self.places if name not in known]
        if unused and len(unused) == len(self.places):
            raise ValueError(f"captions describe {unused[:5]}, not found below source; correct path or key")
        return {self.places[name]: f"note: {printable(name)} is not below source" for name in unused}


def read_notes(path: Path) -> Notes:
    """Notes of a JSON-lines file; wrong lines are kept with their reasons.

    Raises:
        ValueError: if there is no such file.
    """
    try:
        # Not `splitlines`, for which U+2028 and others that JSON allows inside a text end a line.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"captions={path} cannot be read ({error.strerror}); name a file of JSON lines") from None
    notes = Notes()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _take_line(notes, line, f"{path}:{number}")
    return notes


def _take_line(notes: Notes, line: bytes, place: str) -> None:
    try:
        raw = _parsed(line)
    except WrongNote as error:
        notes.nameless[place] = f"note: {error}"
        return
    name = next((raw[key] for key in ("path", "key") if isinstance(raw.get(key), str) and raw[key]), None)
    if name is None:
        notes.nameless[place] = "note: neither path nor key; name the photograph it describes"
        return
    if name in notes.places:
        notes.nameless[place] = f"note: {printable(name)} has one already, at {notes.places[name]}"
        return
    notes.places[name] = place
    try:
        notes.told[name] = _checked(raw)
    except WrongNote as error:
        notes.wrong[name] = f"note: {place}: {error}"


def note_beside(path: Path) -> tuple[Note, bool]:
    """The note in `<image>.json`, empty without one, and whether that file is another program's.

    Raises:
        WrongNote: naming the file, where it is ours and wrong, or no JSON.
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
    """The note in a tar member's text (`.txt`) or JSON, and the reasons why parts of it were ignored or altered."""
    if ending == ".txt":
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
        raw: dict[str, Any] = {"caption": text} if text.strip() else {}
    else:
        try:
            raw = _parsed(content)
        except WrongNote as error:
            return {}, [str(error)]
    note: Note = {}
    faults = []
    for name in sorted(raw.keys() & (FIELDS - {"key", "path", "lq_path"} | {"caption"})):
        if fault := _type_fault(name, raw[name]):
            faults.append(fault)
        elif raw[name]:
            note[name] = raw[name]
    lone = note.pop("caption", None)
    given = {name: note.pop(name) for name in CAPTIONS if name in note}
    texts: dict[str, Any] = given if len(given) == len(CAPTIONS) else {name: lone for name in CAPTIONS if lone}
    if given and not texts:
        faults.append("some of the three captions; give all of them or none")
    if caption_fault(texts.values()):
        faults.append("marks of a trace taken out of its captions")
    return note | {name: plain(text) for name, text in texts.items() if text and plain(text)}, faults


def plain(text: str) -> str:
    """The text on one line, without characters that would close a field of the trace."""
    return " ".join("".join(" " if caption_fault([mark]) else mark for mark in text).split())


def _parsed(content: bytes) -> dict[str, Any]:
    """A JSON object, nulls left out."""
    try:
        raw = json.loads(content.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise WrongNote(f"no JSON in UTF-8 ({error})") from None
    if not isinstance(raw, dict):
        raise WrongNote(f"a JSON {type(raw).__name__}, not an object with fields")
    return {name: value for name, value in raw.items() if value is not None}


def _checked(raw: Note) -> Note:
    unknown = sorted(set(raw) - FIELDS)
    if unknown:
        raise WrongNote(f"the unknown fields {unknown}; known: {sorted(FIELDS)}")
    faults = [fault for name, value in raw.items() if (fault := _type_fault(name, value))]
    if faults:
        raise WrongNote(faults[0])
    captions = {name: " ".join(raw[name].split()) for name in CAPTIONS if name in raw}
    if any(captions.values()) and not (len(captions) == len(CAPTIONS) and all(captions.values())):
        raise WrongNote("some of the three captions; give all of them or none")
    if fault := caption_fault(captions.values()):
        raise WrongNote(fault)
    if "key" in raw and not sound_name(raw["key"]):
        raise WrongNote(f"key is {raw['key']!r}: leave out '..', a leading '/' and control characters")
    return raw | captions


def _type_fault(name: str, value: Any) -> str | None:
    """Why a field's value cannot be taken, or None."""
    if value is None:
        return None
    texts = value if name == "tags" else [value]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
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
