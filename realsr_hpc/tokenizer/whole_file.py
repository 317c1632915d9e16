"""Extracts the text tokenizer from a file that holds a whole vocabulary: image codes, control tokens and text.

Chameleon's `text_tokenizer.json` and the `tokenizer.json` of every Hugging Face folder are such files. The text
tokenizer counts its ids from 0; here the pieces from `text_first` on are extracted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realsr_hpc.files import json_value, other_content
from realsr_hpc.vlcot.token_names import code_of, is_text


def read_tree(path: Path) -> dict[str, Any]:
    """The JSON of a tokenizer file. ValueError if it has no vocabulary of named pieces."""
    try:
        tree = json_value(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of json and of UTF-8
        other = other_content(path) or f"is not a tokenizer.json ({error}); copy it again"
        raise ValueError(f"{path} {other}") from None
    vocab = tree.get("model", {}).get("vocab") if isinstance(tree, dict) else None
    if not isinstance(vocab, dict) or not all(isinstance(token, int) for token in vocab.values()):
        raise ValueError(f"{path} is not a tokenizer.json whose model.vocab maps pieces to ids (byte-pair encoding)")
    return tree


def names_of(tree: dict[str, Any]) -> dict[str, int]:
    """Name -> id of all pieces and added tokens."""
    return {**tree["model"]["vocab"], **{item["content"]: item["id"] for item in tree.get("added_tokens") or []}}


def is_whole(tree: dict[str, Any]) -> bool:
    """Whether the file names control tokens or image codes in addition to text."""
    names = names_of(tree)
    return "<racm3:break>" in names or "<eoss>" in names or any(code_of(name) is not None for name in names)


def text_part(tree: dict[str, Any], text_first: int) -> dict[str, Any]:
    """The text tokenizer inside a whole vocabulary, with ids from 0; the inverse of `export.text_files.combined`."""
    whole = tree["model"]

    vocab = {piece: token - text_first for piece, token in whole["vocab"].items() if is_text(piece, token, text_first)}
    added = [
        {**item, "id": item["id"] - text_first}
        for item in tree.get("added_tokens") or []
        if is_text(item["content"], item["id"], text_first)
    ]
    model = {**whole, "vocab": vocab}
    if "merges" in whole:  # without those that build a piece outside the text
        outside = whole["vocab"].keys() - vocab.keys()
        model["merges"] = [merge for merge in whole["merges"] if not {*_parts(merge), "".join(_parts(merge))} & outside]
    return {**tree, "added_tokens": added, "post_processor": None, "model": model}


def _parts(merge: Any) -> list[str]:
    """The two pieces of a merge, which files keep as "a b" or ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def read_text_tree(path: Path, text_first: int | None) -> dict[str, Any]:
    """The text tokenizer of a file: the whole file, or its text part if the file has a whole vocabulary.

    ValueError if it holds a whole vocabulary and `text_first` is None.
    """
    tree = read_tree(path)
    if not is_whole(tree):
        return tree
    if text_first is None:
        raise ValueError(f"{path} holds a whole vocabulary; it cannot be read without a recipe's layout")
    return text_part(tree, text_first)
