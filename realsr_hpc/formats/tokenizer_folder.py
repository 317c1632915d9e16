"""A folder of the tokenizers of Meta's release alone, `vqgan.ckpt` and `text_tokenizer.json`, or both in tokenizer/."""

from __future__ import annotations

from realsr_hpc.formats.found import Found
from realsr_hpc.formats.place import Format, Place, Rotary, Signs
from realsr_hpc.formats.vqgan import open_vqgan

NAME = "Chameleon tokenizer folder"
_IMAGE, _TEXT = ("vqgan.ckpt", "tokenizer/vqgan.ckpt"), ("text_tokenizer.json", "tokenizer/text_tokenizer.json")


def look(place: Place) -> Signs:
    """By its image tokenizer; no weights of a policy."""
    signs = Signs().ask(place.file(*_IMAGE) is not None, "vqgan.ckpt")
    weights = place.file("config.json", "params.json", "models/*/params.json")
    return signs if weights is None else signs.ask(False, f"the absence of {weights.name}")


def open_folder(place: Place, rotary: Rotary | None) -> Found:
    """Image tokenizer, and the text tokenizer where it is there."""
    image = place.file(*_IMAGE)
    assert image is not None, "opened without a look"
    return Found(NAME, image=open_vqgan(Place(image), rotary).image, text=place.file(*_TEXT))


FORMAT = Format(NAME, look, open_folder)
