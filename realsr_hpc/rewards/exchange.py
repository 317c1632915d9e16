"""Requests to a process that computes a reward, and its answers: JSON with images as PNG (docs/judge.md).

`sent` encodes rollouts, `received` decodes them without loss: PNG keeps pixels and JSON keeps floats exactly.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from realsr_hpc.files import Json
from realsr_hpc.records import JPEG, Blur, Candidate, DegradationLabel, Operators, ParsedTrace, ResizeTo, SceneText

VERSION = 1


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SentBlur(_Document):
    """`records.Blur`."""

    kind: Literal["blur"] = "blur"
    kernel: list[list[float]]
    dtype: Literal["float32", "float64"]


class SentResize(_Document):
    """`records.ResizeTo`."""

    kind: Literal["resize"] = "resize"
    side_px: int
    mode: Literal["area", "bilinear", "bicubic"]


class SentJPEG(_Document):
    """`records.JPEG`."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int


class SentRollout(_Document):
    """`records.Candidate`; images are base64 of PNG files, RGB."""

    key: str
    index: int
    member: int
    image: str | None
    lq: str
    gt: str | None
    degradation: str | None
    texts: tuple[str | None, str | None, str | None]
    codes: tuple[list[list[int]] | None, list[list[int]] | None, list[list[int]] | None]
    faults: tuple[str, ...]
    label: DegradationLabel | None
    scene: SceneText | None
    operators: list[SentBlur | SentResize | SentJPEG] | None


class Request(_Document):
    """A batch of rollouts to score."""

    version: Literal[1]
    rollouts: list[SentRollout]


class Answer(BaseModel):
    """Scores in [0, 1] in the order of the rollouts; null for a rollout that could not be scored."""

    model_config = ConfigDict(strict=True)

    scores: list[float | None] = Field()


def sent(candidates: Sequence[Candidate]) -> bytes:
    """The JSON document of a request, in UTF-8."""
    rollouts = [_sent(item).model_dump() for item in candidates]
    return json.dumps({"version": VERSION, "rollouts": rollouts}).encode()


def received(document: bytes) -> list[Candidate]:
    """The rollouts of a request. Raises ValueError naming the fault."""
    try:
        request = Request.model_validate(_json(document))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return [_received(item) for item in request.rollouts]


def answer(scores: np.ndarray, broken: np.ndarray) -> dict[str, list[float | None]]:
    """The JSON document of an answer: null for each of the scores [n] that is marked in broken [n]."""
    pairs = zip(scores.tolist(), broken.tolist(), strict=True)
    return {"scores": [None if failed else score for score, failed in pairs]}


def scores_of(document: bytes, count: int) -> np.ndarray:
    """Scores [count] of an answer, NaN for null. ValueError for another format or count, or scores outside 0..1."""
    try:
        scores = Answer.model_validate(_json(document)).scores
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"answer: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if len(scores) != count:
        raise ValueError(f"answer: {len(scores)} scores for {count} rollouts")
    values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    outside = values[(values < 0.0) | (values > 1.0)]
    if outside.size:
        raise ValueError(f"answer: score {outside[0]:g} is outside 0..1")
    return values


def _json(document: bytes) -> Json:
    try:
        return json.loads(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None


def _sent(item: Candidate) -> SentRollout:
    trace = item.trace
    grids = (None if grid is None else grid.tolist() for grid in trace.images)
    return SentRollout(
        key=item.key,
        index=item.index,
        member=item.member,
        image=_png(item.image),
        lq=_png(item.lq) or "",
        gt=_png(item.gt),
        degradation=trace.degradation,
        texts=trace.texts,
        codes=tuple(grids),  # pyright: ignore[reportArgumentType]
        faults=trace.faults,
        label=item.label,
        scene=item.scene,
        operators=None if item.operators is None else [_sent_operator(one) for one in item.operators],
    )


def _received(item: SentRollout) -> Candidate:
    grids = [None if grid is None else np.array(grid, np.int64) for grid in item.codes]
    trace = ParsedTrace(item.degradation, item.texts, (grids[0], grids[1], grids[2]), item.faults)
    lq = _pixels(item.lq)
    if lq is None:
        raise ValueError("rollouts.lq: is empty; every rollout has an LQ image")
    operators: Operators | None = None if item.operators is None else tuple(map(_received_operator, item.operators))
    return Candidate(
        key=item.key,
        lq=lq,
        gt=_pixels(item.gt),
        label=item.label,
        scene=item.scene,
        index=item.index,
        operators=operators,
        trace=trace,
        image=_pixels(item.image),
        member=item.member,
    )


def _sent_operator(operator: Blur | ResizeTo | JPEG) -> SentBlur | SentResize | SentJPEG:
    match operator:
        case Blur():
            return SentBlur.model_validate({"kernel": operator.kernel.tolist(), "dtype": str(operator.kernel.dtype)})
        case ResizeTo():
            return SentResize(**asdict(operator))
        case JPEG():
            return SentJPEG(**asdict(operator))


def _received_operator(operator: SentBlur | SentResize | SentJPEG) -> Blur | ResizeTo | JPEG:
    match operator:
        case SentBlur():
            return Blur(np.array(operator.kernel, operator.dtype))
        case SentResize():
            return ResizeTo(operator.side_px, operator.mode)
        case SentJPEG():
            return JPEG(operator.quality)


def _png(image: np.ndarray | None) -> str | None:
    """An image uint8 [H, W, 3] as base64 of a PNG file."""
    if image is None:
        return None
    held = io.BytesIO()
    Image.fromarray(image).save(held, "PNG", compress_level=1)  # on a local connection stronger compression is slower
    return base64.b64encode(held.getvalue()).decode()


def _pixels(text: str | None) -> np.ndarray | None:
    """The image of base64 text, uint8 [H, W, 3]; None for empty text."""
    if not text:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image is not base64 of a PNG file: {error}") from None
