# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Build a VLCoT trace as tokens, and parse any tokens back.

The response is plain text with seven tags and three image blocks (RealSR-R1):

    <degradation>B blur, R1, N noise, C compression, R2</degradation>
    <rough_understand>text</rough_understand><rough_image>IMG</rough_image>
    <middle_understand>text</middle_understand><middle_image>IMG</middle_image>
    <final_understand>text</final_understand><final_image>IMG</final_image> end-of-turn

without the line breaks. IMG(s) = begin, size, size, then rows of s/f codes each closed by a newline token, end.
Tags and texts are encoded one by one, so a tag's tokens never depend on its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from realsr_hpc.config.schema import IMAGE_PLACEHOLDER, VLCoTConfig
from realsr_hpc.records import ParsedTrace, RolloutGroup
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES, Vocabulary

TEXT_FIELDS = tuple(f"{name}_understand" for name in IMAGE_NAMES)
IMAGE_FIELDS = tuple(f"{name}_image" for name in IMAGE_NAMES)
FIELDS = ("degradation", *(name for pair in zip(TEXT_FIELDS, IMAGE_FIELDS, strict=True) for name in pair))
"""The seven tags in their order."""
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters around an image's number while the text is searched for tags."""
_IMAGE_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class TextCodec(Protocol):
    """The interface that this room requires of a text tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids counted from 0, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of any ids; never raises."""
        ...


@dataclass(frozen=True)
class Trace:
    """A complete chain of thought."""

    degradation: str
    texts: tuple[str, str, str]
    images: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Code grids, int64 [rows, columns]."""


class TraceCodec:
    """Converts traces and prompts to tokens and back, for one vocabulary, text tokenizer and trace shape."""

    def __init__(self, config: VLCoTConfig, vocabulary: Vocabulary, text: TextCodec, downsample: int):
        if IMAGE_PLACEHOLDER not in config.instruction:
            raise ValueError(f"vlcot.instruction has no {IMAGE_PLACEHOLDER}, which marks the place of the LQ image")
        self.config = config
        self.vocabulary = vocabulary
        self.text = text
        self.downsample = downsample
        self._blank = self.encode_text(" ")
        self.shortened_texts = 0
        """Number of texts that `build` has shortened so far because they did not fit their slots."""

    def side(self, size_px: int) -> int:
        """Codes along one side of an image of `size_px`."""
        return size_px // self.downsample

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [self.vocabulary.text_first + token for token in self.text.encode(text)]

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of text tokens; private-use marks are removed, so that no text can be taken for an image."""
        text = self.text.decode([token - self.vocabulary.text_first for token in tokens])
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def image_block(self, codes: np.ndarray) -> list[int]:
        """Tokens of a square code grid [side, side]."""
        vocabulary = self.vocabulary
        size = vocabulary.size_token(codes.shape[0] * self.downsample)
        tokens = [vocabulary.image_begin, size, size]
        for row in codes.tolist():
            tokens += [vocabulary.code_to_id(code) for code in row]
            tokens.append(vocabulary.newline)
        return [*tokens, vocabulary.image_end]

    def prompt(self, lq_codes: np.ndarray) -> list[int]:
        """Prompt tokens: the instruction with the LQ image's codes [side, side] in its place, then end of turn."""
        before, after = self.config.instruction.split(IMAGE_PLACEHOLDER, 1)
        image = self.image_block(lq_codes)
        vocabulary = self.vocabulary
        return [vocabulary.bos, *self.encode_text(before), *image, *self.encode_text(after), vocabulary.end_turn]

    def field(self, name: str, body: list[int]) -> list[int]:
        """A tag around its content."""
        return [*self.encode_text(f"<{name}>"), *body, *self.encode_text(f"</{name}>")]

    def build(self, trace: Trace) -> list[int]:
        """Response tokens of a trace, the end of turn included."""
        tokens = self.field("degradation", self.encode_text(trace.degradation))
        slots = self.config.text_slots or (0, 0, 0)
        for text_name, text, slot, image_name, codes in zip(
            TEXT_FIELDS, trace.texts, slots, IMAGE_FIELDS, trace.images, strict=True
        ):
            body = self._fitted(text, slot) if slot else self.encode_text(text)
            tokens += self.field(text_name, body + self._blank * (slot - len(body)))
            tokens += self.field(image_name, self.image_block(codes))
        return [*tokens, self.vocabulary.end_turn]

    def _fitted(self, text: str, slot: int) -> list[int]:
        """Tokens of as many of the text's words as fit the slot, at least one token; shortened texts are counted."""
        words, body = text.split(" "), self.encode_text(text)
        self.shortened_texts += len(body) > slot
        while len(body) > slot and len(words) > 1:
            words.pop()
            body = self.encode_text(" ".join(words).rstrip(",;: "))
        return body[:slot]

    def parse(self, tokens: Sequence[int]) -> ParsedTrace:
        """The well-formed parts of a response; accepts any token sequence and never raises."""
        faults: list[str] = []
        tokens = list(tokens)
        if self.vocabulary.end_turn in tokens:
            tokens = tokens[: tokens.index(self.vocabulary.end_turn)]
        else:
            faults.append("no end of turn")
        # with images replaced by marks the response is a string in which tags can be searched
        text, grids = self._linearise(tokens, faults)
        bodies = {name: _body(text, name, faults) for name in FIELDS}
        if not faults and text != "".join(f"<{name}>{bodies[name]}</{name}>" for name in FIELDS):
            faults.append("tags out of order, or text beside them")
        texts = tuple(_plain(bodies[name], name, faults) for name in TEXT_FIELDS)
        images = tuple(
            self._image(bodies[name], name, size, grids, faults)
            for name, size in zip(IMAGE_FIELDS, self.config.image_sizes_px, strict=True)
        )
        degradation = _plain(bodies["degradation"], "degradation", faults)
        return ParsedTrace(degradation, texts, images, tuple(faults))  # type: ignore[arg-type]

    def parts_of(self, tokens: Sequence[int]) -> list[int]:
        """Number in `FIELDS` of the part that each response token belongs to, its opening tag included; -1: none.

        A part reaches to the next one's opening tag; a part without its tag has no tokens. Accepts any tokens.
        """
        tokens, parts, position = list(tokens), [-1] * len(tokens), 0
        for number, name in enumerate(FIELDS):
            tag = self.encode_text(f"<{name}>")
            found = next((i for i in range(position, len(tokens)) if tokens[i : i + len(tag)] == tag), None)
            if found is not None:
                parts[found:] = [number] * (len(tokens) - found)
                position = found + len(tag)
        return parts

    def places_of(self, tokens: Sequence[int]) -> list[int]:
        """Number of the place within its part that each response token belongs to, -1: none. Accepts any tokens.

        Places of an image are its codes in reading order, those of a text its pieces between commas, the comma with
        the piece before it.
        """
        vocabulary, parts = self.vocabulary, self.parts_of(tokens)
        places, codes, commas = [-1] * len(parts), dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
        for at, (token, part) in enumerate(zip(tokens, parts, strict=True)):
            if vocabulary.id_to_code(token) is not None:
                places[at] = codes[part]
                codes[part] += 1
            elif part >= 0 and FIELDS[part] not in IMAGE_FIELDS:
                places[at] = commas[part]
                commas[part] += self.decode_text([token]).count(",")
        return places

    def parse_group(self, group: RolloutGroup) -> list[ParsedTrace]:
        """The traces of a group's responses, without padding."""
        rows = zip(group.tokens, group.lengths.tolist(), strict=True)
        return [self.parse(row[:length].tolist()) for row, length in rows]

    def _linearise(self, tokens: list[int], faults: list[str]) -> tuple[str, list[np.ndarray | None]]:
        """The response as one string, in which a numbered mark replaces each image block, and the grids by number."""
        parts: list[str] = []
        grids: list[np.ndarray | None] = []
        position = 0
        while position < len(tokens):
            start = position
            while position < len(tokens) and self.vocabulary.is_text(tokens[position]):
                position += 1
            parts.append(self.decode_text(tokens[start:position]))
            if position == len(tokens):
                break
            if tokens[position] == self.vocabulary.image_begin:
                grid, position = self._read_image(tokens, position, faults)
                parts.append(f"{_OPEN}{len(grids)}{_CLOSE}")
                grids.append(grid)
            else:
                # skip it and continue, so that the well-formed rest is still read
                faults.append(f"token {tokens[position]} outside an image block")
                position += 1
        return "".join(parts), grids

    def _read_image(self, tokens: list[int], position: int, faults: list[str]) -> tuple[np.ndarray | None, int]:
        """Grid of the image block at `position` (None if malformed), and the position after the block."""
        vocabulary = self.vocabulary
        end = position + 1
        while end < len(tokens) and not (vocabulary.is_text(tokens[end]) or tokens[end] == vocabulary.image_begin):
            end += 1
            if tokens[end - 1] == vocabulary.image_end:
                break
        body = tokens[position + 1 : end]
        size_px = vocabulary.size_px(body[0]) if body else None
        side = self.side(size_px) if size_px else 0
        # two size tokens, `side` rows of `side` codes and a newline each, and the end token
        if not side or len(body) != 2 + side * (side + 1) + 1 or body[1] != body[0] or body[-1] != vocabulary.image_end:
            faults.append(f"image block of {len(body) + 1} tokens does not fit its declared size")
            return None, end
        rows = [body[2 + r * (side + 1) : 2 + (r + 1) * (side + 1)] for r in range(side)]
        codes = [[vocabulary.id_to_code(token) for token in row[:-1]] for row in rows]
        if any(row[-1] != vocabulary.newline for row in rows) or any(code is None for row in codes for code in row):
            faults.append(f"image block of {size_px} px has a row that is not codes and a newline")
            return None, end
        return np.array(codes, dtype=np.int64), end

    def _image(
        self, body: str | None, name: str, size_px: int, grids: list[np.ndarray | None], faults: list[str]
    ) -> np.ndarray | None:
        """The field's code grid if it holds one image of the right size; else None, with a fault."""
        if body is None:
            return None
        mark = _IMAGE_MARK.fullmatch(body)
        grid = grids[int(mark.group(1))] if mark else None
        if grid is None:
            faults.append(f"{name} holds no complete image")
        elif grid.shape[0] != self.side(size_px):
            faults.append(f"{name} is {grid.shape[0] * self.downsample} px, not {size_px}")
            return None
        return grid


def _body(text: str, name: str, faults: list[str]) -> str | None:
    """Content of the first `<name>...</name>`."""
    match = re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
    if match is None:
        faults.append(f"no <{name}>...</{name}>")
        return None
    return match.group(1)


def _plain(body: str | None, name: str, faults: list[str]) -> str | None:
    """The field's text without trailing blanks, if it holds nothing but text; else None, with a fault."""
    if body is None:
        return None
    if not body.strip() or _IMAGE_MARK.search(body) or "<" in body:
        faults.append(f"{name} is empty or holds more than text")
        return None
    return body.rstrip(" ")
