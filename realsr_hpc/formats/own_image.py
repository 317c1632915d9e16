"""Our own `image_tokenizer.safetensors`, as training and imports write it."""

from __future__ import annotations

from realsr_hpc.formats.found import Found, FoundImage
from realsr_hpc.formats.place import Format, Place, Rotary, Signs
from realsr_hpc.formats.tensor_files import TensorFiles, open_file

NAME = "image_tokenizer.safetensors of realsr_hpc"


def recognise(place: Place) -> Signs:
    """A safetensors file with the keys of an encoder, a codebook and a decoder."""
    signs = Signs().add(place.path.is_file() and place.path.suffix == ".safetensors", "one .safetensors file")
    wanted = "encoder.mid.block_1.conv1.weight", "quantize.embedding.weight", "decoder.conv_out.weight"
    return signs.add_keys(place.keys(), *wanted)


def open_own(place: Place, rotary: Rotary | None) -> Found:
    """The tensors as stored: their names are ours already."""
    files = TensorFiles([(place.path, open_file(place.path))])
    return Found(NAME, image=FoundImage(NAME, place.path, files.specs, files.read))


FORMAT = Format(NAME, recognise, open_own)
