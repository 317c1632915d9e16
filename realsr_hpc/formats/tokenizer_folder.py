"""A folder with the tokenizers of Meta's release and no policy.

`vqgan.ckpt` and `text_tokenizer.json` are in the folder itself or in its folder tokenizer/.
"""

from __future__ import annotations

from realsr_hpc.formats.found import Found
from realsr_hpc.formats.place import Format, Place, Rotary, Signs
from realsr_hpc.formats.tensor_files import INDEXED
from realsr_hpc.formats.vqgan import open_vqgan

NAME = "Chameleon tokenizer folder"
_OF_A_POLICY = (
    *("config.json", "params.json", "models/*/params.json", "consolidated*.pth", "models/*/consolidated*.pth"),
    *(name for pair in INDEXED for name in pair),
)
"""Files of a policy: a folder with one of them is an incomplete policy, not a folder of tokenizers."""
_IMAGE, _TEXT = ("vqgan.ckpt", "tokenizer/vqgan.ckpt"), ("text_tokenizer.json", "tokenizer/text_tokenizer.json")


def recognise(place: Place) -> Signs:
    """Recognised by its image tokenizer and the absence of a policy's files."""
    signs = Signs().add(place.file(*_IMAGE) is not None, "vqgan.ckpt")
    weights = place.file(*_OF_A_POLICY)
    return signs if weights is None else signs.add(False, f"the absence of {weights.name}")


def open_folder(place: Place, rotary: Rotary | None) -> Found:
    """The image tokenizer, and the text tokenizer if there is one."""
    image = place.file(*_IMAGE)
    assert image is not None, "call recognise before opening"
    return Found(NAME, image=open_vqgan(Place(image), rotary).image, text=place.file(*_TEXT))


FORMAT = Format(NAME, recognise, open_folder)
