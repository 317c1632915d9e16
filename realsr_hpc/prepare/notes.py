"""What is written about photographs beforehand: captions, tags, splits and partners, from files.

One JSON-lines file for all (a `path` relative to the source, or a `key`, in each line), `<image>.json` beside a
photograph, or in a tar the member of the same name with `.json` or `.txt`. In a tar's JSON, which is often somebody
else's, unknown fields are passed over and a lone `caption` stands for the three; in our own files they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Note = dict[str, Any]
CAPTIONS = ("caption_rough", "caption_middle", "caption_final")
FIELDS = frozenset({"key", "path", "split", *CAPTIONS, "tags", "lq_path", "source"})


def read_notes(path: Path) -> dict[str, Note]:
    """Notes of a JSON-lines file by path or key.

    Raises:
        ValueError: naming file and line of a note that is wrong or names no photograph.
    """
    notes: dict[str, Note] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        note = _checked(json.loads(line), f"{path}:{number}")
        name = note.get("path") or note.get("key")
        if not name:
            raise ValueError(f"{path}:{number} has neither path nor key; name the photograph it describes")
        notes[name] = note
    return notes


def note_beside(path: Path) -> Note:
    """The note in `<image>.json`, empty without one."""
    note = path.with_name(path.name + ".json")
    return _checked(json.loads(note.read_text(encoding="utf-8")), str(note)) if note.is_file() else {}


def note_in_tar(content: bytes, ending: str) -> Note:
    """The note in a member's text (`.txt`) or JSON; empty where it says nothing we know."""
    text = content.decode("utf-8", errors="replace").strip()
    try:
        raw = {"caption": text} if ending == ".txt" else json.loads(text)
    except json.JSONDecodeError:
        return {}
    if not isinstance(raw, dict):
        return {}
    note = {name: raw[name] for name in FIELDS - {"key", "path", "lq_path"} if name in raw}
    if isinstance(raw.get("caption"), str) and not any(note.get(name) for name in CAPTIONS):
        note |= dict.fromkeys(CAPTIONS, plain(raw["caption"]))
    return note


def plain(text: str) -> str:
    """One line without what closes a trace's fields."""
    return " ".join(text.replace("<", " ").replace(">", " ").split())


def refuse_unused(notes: Mapping[str, Note], used: Iterable[str]) -> None:
    """Refuse notes about photographs that are not there; `used` are keys and paths without ending.

    Raises:
        ValueError: naming the first of them.
    """
    known = set(used)
    unused = [name for name, note in notes.items() if name not in known and note.get("key", _stem(name)) not in known]
    if unused:
        raise ValueError(f"captions describe {unused[:5]}, not found below source; correct path or key")


def _checked(note: Note, where: str) -> Note:
    unknown = sorted(set(note) - FIELDS)
    if unknown:
        raise ValueError(f"{where} has the unknown fields {unknown}; known: {sorted(FIELDS)}")
    texts = [note.get(name, "") for name in CAPTIONS]
    if any(texts) and not all(texts):
        raise ValueError(f"{where} has some of the three captions; give all of them or none")
    if any("<" in text or ">" in text for text in texts):
        raise ValueError(f"{where} has '<' or '>' in a caption: leave out what closes a trace's fields")
    return note


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()
