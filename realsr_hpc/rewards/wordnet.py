"""Synonyms of nouns from WordNet's database files (index.noun, data.noun), without a library or a download.

Only the two most frequent senses of a word are used; rarer senses would accept unrelated words. Files:
wordnet.princeton.edu, or Debian's package `wordnet-base`. Format: wndb(5WN).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

_SENSES = 2
_ENDINGS = {"s": "", "ses": "s", "xes": "x", "zes": "z", "ches": "ch", "shes": "sh", "men": "man", "ies": "y"}
"""Plural ending -> singular ending (morphy(7WN)); irregular plurals are listed in noun.exc."""


class WordNet:
    """Looks up the synonyms of nouns."""

    def __init__(self, folder: Path) -> None:
        index, self._data = folder / "index.noun", folder / "data.noun"
        missing = [path for path in (index, self._data) if not path.is_file()]
        if missing:
            raise ValueError(f"options.wordnet_dir={folder}: {missing[0].name} is not there; Debian: wordnet-base")
        lines = index.read_text(encoding="utf-8").splitlines()
        self._offsets = dict(_senses(line) for line in lines if not line.startswith(" "))
        irregular = folder / "noun.exc"
        rows = irregular.read_text(encoding="utf-8").splitlines() if irregular.is_file() else []
        self._singular = dict(row.split()[:2] for row in rows)
        self.synonyms = lru_cache(maxsize=None)(self._synonyms)

    def _synonyms(self, word: str) -> frozenset[str]:
        """Synonyms of a word in lower case; empty for a word that WordNet does not have."""
        lemma = word.lower().replace(" ", "_")
        regular = [lemma.removesuffix(end) + to for end, to in _ENDINGS.items() if lemma.endswith(end)]
        forms = [lemma, self._singular.get(lemma, lemma), *regular]
        known = next((form for form in forms if form in self._offsets), None)
        if known is None:
            return frozenset()
        with self._data.open("rb") as data:
            found = {name for offset in self._offsets[known] for name in _words_at(data, offset)}
        return frozenset(name.lower().replace("_", " ") for name in found) - {word.lower()}


def _senses(line: str) -> tuple[str, tuple[int, ...]]:
    """Lemma, and byte offsets of its most frequent senses in data.noun."""
    fields = line.split()
    count = int(fields[2])
    return fields[0], tuple(int(offset) for offset in fields[-count:][:_SENSES])


def _words_at(data: BinaryIO, offset: int) -> list[str]:
    """The words of the sense at an offset: `offset file type count word id word id ...`."""
    data.seek(offset)
    fields = data.readline().decode().split()
    return fields[4 : 4 + 2 * int(fields[3], 16) : 2]
