"""Captions and tags by a model: any transformers image-to-text or image-classification model from a local folder.

The model captions the photograph three times, at a quarter, half and all of `FULL_PX`: the rough text may only mention
what is visible in the small picture. Nothing is downloaded. The texts are those of the model: look at some before
training on them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from realsr_hpc.files import printable, sha256_of
from realsr_hpc.parallel.backend import named_device
from realsr_hpc.prepare.notes import plain

FULL_PX = 512
"""Shorter side at which the final caption's picture is shown."""
_MAX_NEW_TOKENS = (16, 32, 64)
_NUM_TAGS = 5
_MIN_SHARE = 0.1
"""Least probability of a class that becomes a tag."""
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
    """Rough, middle and final captions of photographs."""

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
    """Tags of photographs: the likeliest classes of a model, their first synonym."""

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
    """Up to five content words: first those that occur in most of the three captions, then by position in the final
    one."""
    texts = [_content_words(text) for text in captions]
    counts = Counter(word for words in texts for word in set(words))
    order = list(dict.fromkeys(word for words in reversed(texts) for word in words))
    return tuple(sorted(order, key=lambda word: -counts[word])[:_NUM_TAGS])


def _content_words(text: str) -> list[str]:
    words = re.findall(r"[a-z][a-z-]+", text.lower())
    return [word for word in words if len(word) > 2 and word not in _EMPTY and not word.endswith("ing")]


def _class_name(label: str) -> str:
    """ImageNet's labels list synonyms: `tabby, tabby cat`."""
    return plain(label.split(",")[0]).replace("_", " ").lower()


def _reduced(image: UInt8[np.ndarray, "H W 3"], shorter_px: int) -> Image.Image:
    picture = Image.fromarray(image)
    scale = shorter_px / min(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _name(folder: Path) -> str:
    """Of a model, by its folder's name and what lies in it: what one model said is never taken for another's."""
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
    except (
        Exception
    ) as error:  # what the parts of transformers trip over in a folder that is damaged or of another kind
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{field}={folder} does not load as a transformers {task} model: {told}") from None
