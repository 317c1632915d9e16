"""Our own exports: a Hugging Face folder that also holds `realsr.json`, the image decoder and the run's recipe."""

from __future__ import annotations

from dataclasses import replace

from realsr_hpc.formats import hugging_face
from realsr_hpc.formats.found import Found, FoundImage
from realsr_hpc.formats.place import Format, Place, Rotary, Signs, read_json
from realsr_hpc.formats.tensor_files import TensorFiles, safetensors_specs
from realsr_hpc.runfolder import RECIPE

NAME = "export of realsr_hpc"
DECODER_FILE = "vq_decoder.safetensors"


def recognise(place: Place) -> Signs:
    """Recognised by the files that only our exports have, then by those of any Hugging Face folder."""
    signs = Signs().add(place.file("realsr.json") is not None, "realsr.json")
    signs = signs.add(place.file(RECIPE) is not None, RECIPE)
    if not signs.against:
        inner = hugging_face.recognise(place)
        signs = signs.joined(inner)
    return signs


def open_export(place: Place, rotary: Rotary | None) -> Found:
    """The policy, and the image tokenizer assembled from encoder and decoder. ValueError if a file is missing."""
    found = hugging_face.open_hugging_face(place, rotary)
    assert found.policy is not None, "a folder always has a policy"
    if place.file("tokenizer.json") is None:
        raise ValueError(f"{place.path / 'tokenizer.json'} is missing; copy the export again")
    read_json(place.path / "realsr.json")
    image = found.image
    if image is not None and place.file(DECODER_FILE) is not None:
        image = _with_decoder(image, place)
    policy = replace(found.policy, format=NAME)
    return Found(NAME, policy, image, found.text, place.path / RECIPE)


def _with_decoder(encoder: FoundImage, place: Place) -> FoundImage:
    """Image tokenizer with the encoder's tensors and those of the decoder's file.

    The decoder's file also has `codebook`, the codes as they are used (normalised if the recipe normalises them);
    it is omitted here, because the raw codes are among the other tensors.
    """
    path = place.path / DECODER_FILE
    beside = TensorFiles([(path, safetensors_specs(path))])
    own = {name: spec for name, spec in beside.specs.items() if name != "codebook"}
    return FoundImage(
        "image tokenizer of the export",
        place.path,
        {**encoder.tensors, **own},
        lambda name: beside.read(name) if name in own else encoder.read(name),
        {},  # the recipe in the folder has all settings
        encoder.faults,
    )


FORMAT = Format(NAME, recognise, open_export)
