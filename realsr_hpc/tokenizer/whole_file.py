"""Extracts the text tokenizer from a file that holds a whole vocabulary: image codes, control tokens and text.

Chameleon's `text_tokenizer.json` and the `tokenizer.json` of every Hugging Face folder are such files. The text
tokenizer counts its ids from 0; here the pieces from `text_first` on are extracted.
"""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict, cast

from realsr_hpc.files import Json, json_value, other_content
from realsr_hpc.vlcot.token_names import code_of, is_text


class AddedToken(TypedDict):
    """A token of a tokenizer.json that the text is split at before it is cut into pieces."""

    id: int
    content: str
    single_word: NotRequired[bool]
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


class PieceModel(TypedDict):
    """The byte-pair encoding of a tokenizer.json, as far as it is read; its other keys are kept."""

    vocab: dict[str, int]
    """Name -> id."""
    merges: NotRequired[list[str | list[str]]]
    """Two pieces each, as "a b" or ["a", "b"]."""


class TokenizerTree(TypedDict):
    """A tokenizer.json, as far as it is read; its other keys are kept."""

    model: PieceModel
    added_tokens: NotRequired[list[AddedToken] | None]
    post_processor: NotRequired[Json]


def read_tree(path: Path) -> TokenizerTree:
    """The JSON of a tokenizer file. ValueError if it has no vocabulary of named pieces, or a part of another type."""
    try:
        tree = json_value(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of json and of UTF-8
        other = other_content(path) or f"is not a tokenizer.json ({error}); copy it again"
        raise ValueError(f"{path} {other}") from None
    if fault := _fault(tree):
        raise ValueError(f"{path} {fault}")
    return cast("TokenizerTree", tree)  # as _fault found it


def _fault(tree: Json) -> str:
    """What makes a document no `TokenizerTree`; empty if it is one."""
    model = tree.get("model") if isinstance(tree, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tree, dict) or not isinstance(model, dict) or not isinstance(vocab, dict):
        return "is not a tokenizer.json whose model.vocab maps pieces to ids (byte-pair encoding)"
    if not all(isinstance(token, int) for token in vocab.values()):
        return "is not a tokenizer.json whose model.vocab maps pieces to ids (byte-pair encoding)"
    merges, added = model.get("merges", []), tree.get("added_tokens") or []
    if not isinstance(merges, list) or not all(isinstance(merge, str | list) for merge in merges):
        return "is not a tokenizer.json whose model.merges lists pairs of pieces; copy it again"
    if not isinstance(added, list) or not all(map(_is_added, added)):
        return "is not a tokenizer.json whose added_tokens have an id and a content; copy it again"
    return ""


def _is_added(token: Json) -> bool:
    return isinstance(token, dict) and isinstance(token.get("id"), int) and isinstance(token.get("content"), str)


def names_of(tree: TokenizerTree) -> dict[str, int]:
    """Name -> id of all pieces and added tokens."""
    return {**tree["model"]["vocab"], **{item["content"]: item["id"] for item in tree.get("added_tokens") or []}}


def is_whole(tree: TokenizerTree) -> bool:
    """Whether the file names control tokens or image codes in addition to text."""
    names = names_of(tree)
    return "<racm3:break>" in names or "<eoss>" in names or any(code_of(name) is not None for name in names)


def text_part(tree: TokenizerTree, text_first: int) -> TokenizerTree:
    """The text tokenizer inside a whole vocabulary, with ids from 0; the inverse of `export.text_files.combined`."""
    whole = tree["model"]
    vocab = {piece: token - text_first for piece, token in whole["vocab"].items() if is_text(piece, token, text_first)}
    added: list[AddedToken] = [
        {**item, "id": item["id"] - text_first}
        for item in tree.get("added_tokens") or []
        if is_text(item["content"], item["id"], text_first)
    ]
    model: PieceModel = {**whole, "vocab": vocab}
    if "merges" in whole:  # without those that build a piece outside the text
        outside = whole["vocab"].keys() - vocab.keys()
        model["merges"] = [merge for merge in whole["merges"] if not {*_parts(merge), "".join(_parts(merge))} & outside]
    return {**tree, "added_tokens": added, "post_processor": None, "model": model}


def _parts(merge: str | list[str]) -> list[str]:
    """The two pieces of a merge."""
    return merge.split(" ") if isinstance(merge, str) else merge


def read_text_tree(path: Path, text_first: int | None) -> TokenizerTree:
    """The text tokenizer of a file: the whole file, or its text part if the file has a whole vocabulary.

    ValueError if it holds a whole vocabulary and `text_first` is None.
    """
    tree = read_tree(path)
    if not is_whole(tree):
        return tree
    if text_first is None:
        raise ValueError(f"{path} holds a whole vocabulary; it cannot be read without a recipe's layout")
    return text_part(tree, text_first)
