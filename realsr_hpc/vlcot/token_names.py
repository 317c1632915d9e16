"""Chameleon's token names, to compare the names in a tokenizer file with the layout.

`IMGIMG` + decimal digits as letters A..J + `Z` is a code of the image tokenizer, `<reservedN>` the id N + 4, other
names in `<...>` are control tokens, everything else is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from realsr_hpc.vlcot.vocabulary import Vocabulary

_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_RESERVED = re.compile(r"<reserved(\d+)>")
_DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")
_LETTERS = str.maketrans("ABCDEFGHIJ", "0123456789")


def code_name(code: int) -> str:
    """Chameleon's name of a codebook entry: digits as letters, closed by Z."""
    return f"IMGIMG{str(code).translate(_DIGITS)}Z"


def code_of(name: str) -> int | None:
    """Codebook index of an image code's name; None for any other token."""
    found = _CODE.fullmatch(name)
    return int(found[1].translate(_LETTERS)) if found else None


def is_control(name: str) -> bool:
    """Whether a name looks like a control token rather than a piece of text."""
    return len(name) > 2 and name.startswith("<") and name.endswith(">")


def is_text(name: str, token: int, text_first: int) -> bool:
    """Whether an entry of a whole vocabulary is text: from `text_first` on, no image code, no reserved id."""
    return token >= text_first and code_of(name) is None and _RESERVED.fullmatch(name) is None


def num_text(names: Mapping[str, int], text_first: int) -> int:
    """Text tokens of a whole vocabulary: ids from `text_first` to the last piece of text."""
    return max((t + 1 - text_first for name, t in names.items() if is_text(name, t, text_first)), default=0)


def name_faults(names: Mapping[str, int], vocabulary: Vocabulary) -> list[str]:
    """How a file's names contradict the layout; [] if they agree. Messages name counts and ids of both sides."""
    faults = [*_code_faults(names, vocabulary)]
    wanted = {
        "<s>": vocabulary.bos,
        "<pad>": vocabulary.pad,
        "</s>": vocabulary.eos,
        "<racm3:break>": vocabulary.image_begin,
        "<eoss>": vocabulary.image_end,
    }
    for name, token in names.items():
        # `<reservedN>` has id N + 4; names that the layout does not fix keep their id
        reserved = _RESERVED.fullmatch(name)
        should = int(reserved[1]) + 4 if reserved else wanted.get(name, token)
        if token != should:
            faults.append(f"{name} has id {token} (the recipe's layout: {should})")
    last = max(names.values(), default=0)
    if last >= vocabulary.size:
        faults.append(f"the largest id is {last} (the recipe's layout has {vocabulary.size} ids)")
    below = {n: t for n, t in names.items() if t < vocabulary.text_first and code_of(n) is None and not is_control(n)}
    if below:
        name, token = min(below.items(), key=lambda item: item[1])
        faults.append(
            f"{len(below)} pieces of text have ids below {vocabulary.text_first}, where the recipe's layout begins its "
            f"text, first {name!r} ({token})"
        )
    return faults


def _code_faults(names: Mapping[str, int], vocabulary: Vocabulary) -> list[str]:
    codes = {code: token for name, token in names.items() if (code := code_of(name)) is not None}
    if not codes:
        return ["no token is named IMGIMG...Z, so that the ids of the image codes are unknown"]
    if len(codes) != vocabulary.num_codes:
        return [f"{len(codes)} image codes are named IMGIMG...Z (the recipe's layout: {vocabulary.num_codes})"]
    wrong = [code for code, token in sorted(codes.items()) if _id(code, vocabulary) != token]
    if not wrong:
        return []
    code = wrong[0]
    return [
        f"{len(wrong)} of {len(codes)} image codes have other ids, first code {code} with {codes[code]} (the recipe's "
        f"layout: {_id(code, vocabulary)})"
    ]


def _id(code: int, vocabulary: Vocabulary) -> int | None:
    return vocabulary.code_to_id(code) if code < vocabulary.num_codes else None
