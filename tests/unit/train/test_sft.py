"""Cross-entropy by part: texts, and each image of a trace by itself, whatever is packed into a microbatch."""

import pytest
import torch

from realsr_hpc.train.sft_loss import images_begun, loss_by_part, means_by_part
from realsr_hpc.vlcot.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_codes=8, codes_in_block=8, text_first=800, num_text=20, size=896)
BEGIN, END, NEWLINE, TURN = (getattr(VOCABULARY, name) for name in ("image_begin", "image_end", "newline", "end_turn"))


def trace(words: int) -> list[int]:
    """Targets of a response: texts of `words` tokens, images of 1, 2 and 3 codes."""
    targets = []
    for image in (1, 2, 3):
        targets += [805] * words + [BEGIN, *[5] * image, NEWLINE, END]
    return [*targets, TURN]


def test_parts_are_told_apart_in_every_sequence():
    targets = torch.tensor([*trace(2), *trace(4), *trace(1)])
    begun = images_begun(targets, VOCABULARY)
    assert begun[targets == TURN].tolist() == [3, 3, 3]
    assert int((begun == 0).sum()) == 2 + 4 + 1  # the texts before the first image
    logprobs = torch.where(targets == 5, -1.0 * begun, -10.0)
    found = {name: float(value) for name, value in loss_by_part(logprobs, targets, VOCABULARY).items()}
    counts = {name: found[f"count/{name}"] for name in ("rough", "middle", "final", "text", "all")}
    assert counts == {"rough": 3, "middle": 6, "final": 9, "text": 3 * (2 + 4 + 1), "all": len(targets)}
    means = means_by_part(found)
    assert [means[f"heldout/loss_{name}/mean"] for name in ("rough", "middle", "final", "text")] == [1, 2, 3, 10]
    assert means["heldout/loss/mean"] == pytest.approx(-float(logprobs.mean()))
