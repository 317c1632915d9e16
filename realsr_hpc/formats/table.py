"""All formats, the most specific first. To add one, write its module and list it here."""

from __future__ import annotations

from pathlib import Path

from realsr_hpc.formats import (
    hugging_face,
    llamagen,
    meta_chameleon,
    own_export,
    own_image,
    tokenizer_folder,
    vqgan,
)
from realsr_hpc.formats.found import Found, FoundImage
from realsr_hpc.formats.place import Format, Place, Rotary

FORMATS: tuple[Format, ...] = (
    own_export.FORMAT,
    hugging_face.FORMAT,
    meta_chameleon.FORMAT,
    own_image.FORMAT,
    llamagen.FORMAT,
    vqgan.FORMAT,
    tokenizer_folder.FORMAT,
)


def open_source(path: Path, rotary: Rotary | None = None) -> Found:
    """The weights at `path`, opened by the format that recognises them.

    ValueError if no format does: the message names the nearest format and which of its signs are absent. ValueError
    also if a file is missing or damaged, or if a folder holds weights in two formats.
    """
    place = Place(path)
    tried, recognised = [], []
    for known in FORMATS:
        signs = known.recognise(place)
        if not signs.against and place.path.is_file():
            return known.open(place, rotary)  # the first, most specific format whose keys are all present
        if not signs.against:
            recognised.append(known)
        tried.append((len(signs.support) / (len(signs.support) + len(signs.against)), known, signs))
    if own_export.FORMAT in recognised:
        recognised.remove(hugging_face.FORMAT)  # our exports are Hugging Face folders too
    if len(recognised) > 1:
        names = " and ".join(known.name for known in recognised)
        raise ValueError(f"{path} holds weights in two formats, {names}; move one of them to another folder")
    if recognised:
        [known] = recognised
        return known.open(place, rotary)
    _, nearest, signs = max(tried, key=lambda row: row[0])
    if not signs.support:
        raise ValueError(
            f"{path} is in none of the known formats: {', '.join(known.name for known in FORMATS)}; it has "
            "none of their signs"
        )
    raise ValueError(
        f"{path} is in no known format; nearest is {nearest.name}: {', '.join(signs.support)} found, but not "
        f"{', '.join(signs.against)}"
    )


def open_image(path: Path) -> FoundImage:
    """The image tokenizer of a file or folder. ValueError if there is none, or it has no decoder."""
    image = open_source(path).image
    if image is None or not image.whole:
        raise ValueError(f"image_tokenizer={path}: it has no image tokenizer with a decoder")
    return image
