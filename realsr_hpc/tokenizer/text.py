"""Text tokenizer: byte-level BPE through the `tokenizers` library.

Ids start at 0 and there are no special tokens: vlcot/ decides where text is in the policy's vocabulary.
Every byte has an id, so any text can be encoded; the seven tags are single tokens if trained by
`train_text_tokenizer`, and never merge with their neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from realsr_hpc.files import check_listed, replacing
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.whole_file import read_text_tree

_PIECES = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+")
"""Words with the space before them, single digits, runs of punctuation, runs of white space."""


class TextTokenizer:
    """A `tokenizer.json`; encodes to and decodes from ids in [0, vocab_size)."""

    def __init__(self, path: Path | str, text_first: int | None = None) -> None:
        """`path`: if relative, it starts at the project root. ValueError if it is not a tokenizer.json.

        text_first: first text id in a file that holds a whole vocabulary, as Chameleon's and Hugging Face's do.
        """
        path = resolve(path)
        if not path.is_file():
            raise ValueError(
                f"text_tokenizer.path names {path}, which does not exist: give a tokenizer.json, or train one with "
                "recipe=tokenizer_tiny"
            )
        check_listed(path)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(read_text_tree(path, text_first)))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"text_tokenizer.path names {path}, which is not a tokenizer.json: {error}") from None
        self.vocab_size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids: those out of range are ignored, broken UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False)


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int, path: Path | str, whole_tokens: Sequence[str] = ()
) -> TextTokenizer:
    """Train on `texts`, write `path` (under a temporary name, then renamed) and return the loaded tokenizer.

    The vocabulary is the 256 bytes, merges, and each of `whole_tokens` (the trace's tags) as one token. Raises
    ValueError if `vocab_size` has no room for bytes and whole tokens.
    """
    fixed = 256 + len(whole_tokens)
    if vocab_size < fixed:
        raise ValueError(
            f"tokenizer_training.text_vocab_size is {vocab_size}: 256 bytes and {len(whole_tokens)} whole tokens need "
            f"at least {fixed}"
        )
    # byte-level BPE: every text has an encoding, also one in an unknown script
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # added after training, so that merges cannot cross a tag
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole_tokens])
    path = Path(path).absolute()
    with replacing(path) as aside:
        tokenizer.save(str(aside))
    return TextTokenizer(path)
