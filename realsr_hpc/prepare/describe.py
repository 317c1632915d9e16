"""Captions and tags by a model: any transformers image-to-text or image-classification model from a local folder.

The model captions the photograph three times, reduced to a shorter side of a quarter, half and all of `FULL_PX`: the
rough text must only mention what is visible in the small image. Nothing is downloaded. The texts are stored as the
model writes them: look at some of them before training.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any  # transformers' pipelines

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from realsr_hpc.files import printable, sha256_of
from realsr_hpc.parallel.backend import named_device
from realsr_hpc.prepare.notes import plain

FULL_PX = 512
"""Shorter side in px of the image that the final caption describes."""
_MAX_NEW_TOKENS = (16, 32, 64)
_NUM_TAGS = 5
_MIN_SHARE = 0.1
"""Smallest probability of a class that becomes a tag."""
_EMPTY = frozenset(
    "a about above across after against all along also among an and another any are around as at back background be "
    "behind below beneath beside between big both bottom bright but by can close closeup color colored colour couple "
    "covered dark down each few filled for foreground from front full group has have having high image in inside into "
    "is it its large left light little long looking lot many middle more most near next no not of off on one only "
    "onto other out over part photo photograph picture piece right seen several shown side sits sitting small some "
    "stand standing stands that the their them there these they this three through to top towards two under up upon "
    "various very view which while with within without".split()
)

Images = Sequence[UInt8[np.ndarray, "H W 3"]]
Captions = tuple[str, str, str]


class Captioner:
    """Writes rough, middle and final captions of photographs."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._pipe = _pipeline("image-to-text", "captioner", folder, device)
        self.name = f"{_name(folder)}-{FULL_PX}"

    def __call__(self, images: Images) -> list[Captions]:
        """The three captions of each image."""
        levels = []
        # Without a padding token transformers cannot batch: captioners on GPT-2 have none.
        batch_size = len(images) if self._pipe.tokenizer.pad_token_id is not None else 1
        for divisor, limit in zip((4, 2, 1), _MAX_NEW_TOKENS, strict=True):
            shown = [_reduced(image, FULL_PX // divisor) for image in images]
            told = self._pipe(
                shown, batch_size=batch_size, generate_kwargs={"max_new_tokens": limit, "do_sample": False}
            )
            levels.append([plain(answers[0]["generated_text"]).lower() or "a photograph" for answers in told])
        return list(zip(*levels, strict=True))


class ClassTagger:
    """Tags photographs with the likeliest classes of a model, each by the first of its synonyms."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._pipe = _pipeline("image-classification", "tagger", folder, device)
        self.name = _name(folder)

    def __call__(self, images: Images) -> list[tuple[str, ...]]:
        """Up to five tags of each image, the likeliest first."""
        told = self._pipe([_reduced(image, FULL_PX) for image in images], batch_size=len(images), top_k=_NUM_TAGS)
        return [
            tuple(dict.fromkeys(_class_name(answer["label"]) for answer in answers if answer["score"] >= _MIN_SHARE))
            for answers in told
        ]


def tags_of_captions(captions: Captions) -> tuple[str, ...]:
    """Up to five content words, ordered by the number of captions that contain them, then by position in the final
    one."""
    texts = [_content_words(text) for text in captions]
    counts = Counter(word for words in texts for word in set(words))
    order = list(dict.fromkeys(word for words in reversed(texts) for word in words))
    return tuple(sorted(order, key=lambda word: -counts[word])[:_NUM_TAGS])


def _content_words(text: str) -> list[str]:
    words = re.findall(r"[a-z][a-z-]+", text.lower())
    return [word for word in words if len(word) > 2 and word not in _EMPTY and not word.endswith("ing")]


def _class_name(label: str) -> str:
    """The first synonym of a label; those of ImageNet read `tabby, tabby cat`."""
    return plain(label.split(",")[0]).replace("_", " ").lower()


def _reduced(image: UInt8[np.ndarray, "H W 3"], shorter_px: int) -> Image.Image:
    picture = Image.fromarray(image)
    scale = shorter_px / min(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _name(folder: Path) -> str:
    """A model's name for its journal: its folder's name and a hash of the files, so that models are never confused."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(f"{path.name}\0{sha256_of(path)}\n".encode("utf-8", "surrogateescape"))
    return f"{printable(folder.resolve().name)}-{whole.hexdigest()[:12]}"


def _pipeline(task: str, field: str, folder: Path, device: str) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{field}={folder} holds no config.json: give the folder of a transformers {task} model")
    from transformers import pipeline

    where = named_device(device)
    try:
        return pipeline(task, model=str(folder), device=where)  # type: ignore
    except Exception as error:  # transformers raises many kinds for a damaged folder or another kind of model
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{field}={folder} does not load as a transformers {task} model: {told}") from None
