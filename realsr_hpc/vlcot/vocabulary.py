"""Token ids in Chameleon's layout, for its own sizes and for a tiny one.

Chameleon: `<s>` 0, `<pad>` 1, `</s>` 2, image codes from 4, then the reserved block that holds
end of image, begin of image (`<racm3:break>`), end of turn, `<image>`, newline and the size tokens, then text.
Every special id keeps its distance from the end of the first image-code block, so that with 8192 codes the ids
are Chameleon's own (8196, 8197, 8710, 8711, 8803, 8804 + n, text from 16384). The f = 8 variant adds a second
block of 8192 image ids after the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from realsr_hpc.config.derived import SIZE_UNIT_PX
from realsr_hpc.config.schema import VLCoTConfig

IMAGE_NAMES = ("rough", "middle", "final")
"""The images of a trace, each with a text before it, in their order; `vlcot.image_sizes_px` has their sides."""

_CHAMELEON_CODES = 8192
_CHAMELEON_TEXT_FIRST = 16384
_CHAMELEON_SIZE = 65536
_TINY_RESERVED = 768
"""Ids between the tiny image codes and its text: the special tokens and size tokens up to 4096 px."""


@dataclass(frozen=True)
class Vocabulary:
    """Id layout; `codes_in_block` image ids from 4, the others (if any) from `size - (num_codes - codes_in_block)`."""

    num_codes: int
    codes_in_block: int
    text_first: int
    num_text: int
    size: int

    bos: int = 0
    pad: int = 1
    eos: int = 2
    image_first: int = 4

    @property
    def image_end(self) -> int:
        """`<eoss>`: closes an image block."""
        return self.image_first + self.codes_in_block

    @property
    def image_begin(self) -> int:
        """`<racm3:break>`: opens an image block."""
        return self.image_end + 1

    @property
    def end_turn(self) -> int:
        """Ends the prompt and the response."""
        return self.image_end + 514

    @property
    def newline(self) -> int:
        """Ends a row of image codes."""
        return self.image_end + 607

    def size_token(self, size_px: int) -> int:
        """Token that declares `size_px`. ValueError if it is not a multiple of 32."""
        if size_px % SIZE_UNIT_PX:
            raise ValueError(f"image size {size_px} px is not a multiple of {SIZE_UNIT_PX}: choose one that is")
        return self.image_end + 608 + size_px // SIZE_UNIT_PX

    def size_px(self, token: int) -> int | None:
        """Pixels that a size token declares; None for any other token."""
        units = token - (self.image_end + 608)
        return units * SIZE_UNIT_PX if 0 < units < 128 else None

    def code_to_id(self, code: int) -> int:
        """Token id of codebook entry `code`."""
        if code < self.codes_in_block:
            return self.image_first + code
        return self.size - (self.num_codes - code)

    def id_to_code(self, token: int) -> int | None:
        """Codebook entry of a token id; None for any other token."""
        if self.image_first <= token < self.image_end:
            return token - self.image_first
        code = token - (self.size - self.num_codes)
        return code if self.codes_in_block <= code < self.num_codes else None

    def is_text(self, token: int) -> bool:
        """Whether the id is a text token."""
        return self.text_first <= token < self.text_first + self.num_text


def build_vocabulary(config: VLCoTConfig, codebook_size: int, num_text: int) -> Vocabulary:
    """Layout of `config.vocabulary` for a codebook and a text tokenizer of these sizes.

    Raises ValueError when the named layout does not hold them.
    """
    if config.vocabulary == "tiny":
        text_first = codebook_size + _TINY_RESERVED
        size = -(-(text_first + num_text) // 128) * 128
        return Vocabulary(codebook_size, codebook_size, text_first, num_text, size)
    codes = {"chameleon_f16": _CHAMELEON_CODES, "llamagen_f8": 2 * _CHAMELEON_CODES}[config.vocabulary]
    if codebook_size != codes:
        raise ValueError(
            f"image_tokenizer.codebook_size is {codebook_size}, but vlcot.vocabulary={config.vocabulary} has {codes} "
            f"image ids: set image_tokenizer.codebook_size={codes}"
        )
    room = _CHAMELEON_SIZE - _CHAMELEON_TEXT_FIRST
    if num_text > room:
        raise ValueError(f"the text tokenizer has {num_text} tokens, but {config.vocabulary} has room for {room}")
    size = _CHAMELEON_SIZE + codes - _CHAMELEON_CODES
    return Vocabulary(codes, _CHAMELEON_CODES, _CHAMELEON_TEXT_FIRST, num_text, size)
