"""Writes tokenizer.json for the whole vocabulary: text tokens at their ids, all other tokens as special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from realsr_hpc.export.weight_files import write_json
from realsr_hpc.tokenizer.whole_file import AddedToken, PieceModel, TokenizerTree
from realsr_hpc.vlcot.vocabulary import Vocabulary


def combined(text: TokenizerTree, specials: dict[str, int], vocabulary: Vocabulary) -> TokenizerTree:
    """The tree of tokenizer.json: the text tokenizer with its ids moved up by `text_first`, and all special tokens.

    Raises ValueError if an id is outside the vocabulary, or a text token has the name of a special token.
    """
    own = text.get("added_tokens") or []
    pieces = {**text["model"]["vocab"], **{item["content"]: item["id"] for item in own}}
    outside = [piece for piece, token in pieces.items() if not 0 <= token < vocabulary.num_text]
    if outside:
        raise ValueError(
            f"text tokenizer: {outside[0]!r} has id {pieces[outside[0]]}, the vocabulary holds {vocabulary.num_text} "
            "text tokens counted from 0; give text_tokenizer.path the tokenizer that the run was trained with"
        )
    moved = {piece: token + vocabulary.text_first for piece, token in pieces.items()}
    twice = sorted(moved.keys() & specials.keys())
    if twice:
        raise ValueError(f"text tokenizer: piece {twice[0]!r} is also a special token; train it without that piece")
    raised: list[AddedToken] = [{**item, "id": item["id"] + vocabulary.text_first} for item in own]
    added = [*(_special(name, token) for name, token in specials.items()), *raised]
    vocab = dict(sorted({**specials, **moved}.items(), key=lambda pair: pair[1]))
    model: PieceModel = {**text["model"], "vocab": vocab}
    by_id = sorted(added, key=lambda item: item["id"])
    return {**text, "post_processor": None, "added_tokens": by_id, "model": model}


def _special(name: str, token: int) -> AddedToken:
    return {
        "id": token,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def write_text_files(folder: Path, tree: TokenizerTree, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,
        },
    )
