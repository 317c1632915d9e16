"""A policy carried over to other tokenizers keeps its layers, and rows of what both tokenizers know."""

import pytest
import torch
from safetensors.torch import load_file

from realsr_hpc.export import carry_over as room
from realsr_hpc.export.carry_over import ROWS, carry_over, code_shares
from realsr_hpc.export.weight_files import Aside
from realsr_hpc.locks import LockRefused
from realsr_hpc.tokenizer.text import train_text_tokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.vlcot.sequence import FIELDS


def images() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]


def test_shares_are_those_of_the_places_that_both_code(run):
    shares = code_shares(run.tokens, run.tokens, images())
    met = torch.from_numpy(run.tokens.encode(images()[0], run.config.vlcot.lq_size_px)).unique()
    assert torch.equal(shares[met], torch.eye(len(shares))[met])
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)))


def test_layers_stay_and_rows_follow_their_tokens(run, tmp_path, monkeypatch):
    tags = [f"<{name}>" for name in FIELDS] + [f"</{name}>" for name in FIELDS]
    train_text_tokenizer(["the sky over the sea"] * 3, 310, tmp_path / "text.json", tags)
    text = run.config.text_tokenizer.model_copy(update={"path": str(tmp_path / "text.json")})
    other = TraceTokenizer.load(run.config.model_copy(update={"text_tokenizer": text}), torch.device("cpu"))
    monkeypatch.setattr(room, "APART", 0.0)
    carry_over(run.export, run.tokens, other, images(), tmp_path / "carried")
    carried = load_file(tmp_path / "carried" / "model.safetensors")
    before = load_file(run.export / "model.safetensors")
    assert carried.keys() == {key for key in before if "vqmodel" not in key}
    old, new = run.tokens.codec, other.codec
    met = torch.from_numpy(run.tokens.encode(images()[0], run.config.vlcot.lq_size_px)).unique().tolist()
    for name in ROWS:
        assert carried[name].shape[0] == new.vocabulary.size
        for code in met:
            assert torch.allclose(
                carried[name][new.vocabulary.code_to_id(code)], before[name][old.vocabulary.code_to_id(code)]
            )
        for special in ("bos", "image_begin", "image_end", "newline", "end_turn"):
            assert torch.equal(
                carried[name][getattr(new.vocabulary, special)], before[name][getattr(old.vocabulary, special)]
            )
        (tag,), (same,) = new.encode_text("<rough_image>"), old.encode_text("<rough_image>")
        assert torch.equal(carried[name][tag], before[name][same])
        (word,) = new.encode_text(" sea")
        assert torch.allclose(carried[name][word], before[name][old.encode_text(" sea")].mean(0))
    kept = [key for key in carried if key not in ROWS]
    assert kept and all(torch.equal(carried[key], before[key].float()) for key in kept)


def test_another_stride_is_refused(run):
    codec = run.tokens.codec
    other = TraceTokenizer(
        codec.__class__(codec.config, codec.vocabulary, codec.text, 16), run.tokens.image, torch.device("cpu")
    )
    with pytest.raises(ValueError, match="downsample: 8 and 16"):
        code_shares(run.tokens, other, images())


def test_no_image_is_taken_where_the_result_could_not_be_written(run, tmp_path):
    def taken():
        raise AssertionError("work was begun")
        yield

    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="output=.*there exists; name a new folder"):
        carry_over(run.export, run.tokens, run.tokens, taken(), tmp_path / "there")
    with Aside(tmp_path / "other"), pytest.raises(LockRefused, match="output=.*other: process .* writes it"):
        carry_over(run.export, run.tokens, run.tokens, taken(), tmp_path / "other")
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        carry_over(tmp_path / "there", run.tokens, run.tokens, taken(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
