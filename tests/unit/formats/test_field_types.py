"""A field of another type than its format has is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realsr_hpc.config.whole_files import file_fault
from realsr_hpc.formats.meta_chameleon import _constant
from realsr_hpc.formats.settings import setting_faults, sizes_of
from realsr_hpc.tokenizer.whole_file import read_tree

TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "added_tokens": None}


def test_a_rotary_base_that_is_a_list_is_named():
    with pytest.raises(ValueError, match=r"config.json: rope_theta is \[10000.0\], no number; copy the folder again"):
        sizes_of({"rope_theta": [10000.0]})
    with pytest.raises(ValueError, match="rope_theta"):
        setting_faults({"rope_parameters": {"rope_theta": [10000.0]}})
    faults = setting_faults({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}})
    assert any(fault.startswith("rope_theta 10000.0 and 500000.0 (given twice") for fault in faults)


def test_a_constant_of_params_json_that_is_text_is_named():
    assert _constant({}, "norm_eps", 1e-5) == 1e-5
    with pytest.raises(ValueError, match=r"params.json: norm_eps is '1e-5', no number; copy the tree again"):
        _constant({"norm_eps": "1e-5"}, "norm_eps", 1e-5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": {"vocab": {"a": "0"}}}, "model.vocab maps pieces to ids"),
        ({"model": {"vocab": {"a": 0}, "merges": [3]}}, "model.merges lists pairs of pieces"),
        ({"added_tokens": [{"id": 3}]}, "added_tokens have an id and a content"),
        ({"added_tokens": {"<a>": 3}}, "added_tokens have an id and a content"),
    ],
)
def test_a_part_of_a_tokenizer_that_is_none_is_named(tmp_path: Path, changed: dict[str, object], named: str):
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    assert read_tree(path)["model"]["vocab"]["ab"] == 2
    path.write_text(json.dumps(TOKENIZER | changed), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path} is not a tokenizer.json whose {named}"):
        read_tree(path)


@pytest.mark.parametrize("offsets", [[0, 8], [0], ["a", 8], None])
def test_a_tensor_without_its_place_is_no_safetensors_file(tmp_path: Path, offsets: object):
    header = json.dumps({"__metadata__": {"a": "b"}, "x": {"dtype": "F32", "shape": [2], "data_offsets": offsets}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    (path := tmp_path / "x.safetensors").write_bytes(content)
    assert ("not a safetensors file" in file_fault(path)) == (offsets != [0, 8])
