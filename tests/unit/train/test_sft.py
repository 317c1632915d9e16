"""Cross-entropy by part: texts, and each image of a trace separately, for every packing of microbatches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realsr_hpc.config.learning import SFTConfig
from realsr_hpc.parallel.pipeline import Microbatch
from realsr_hpc.records import DegradationLabel, LQBatch, SceneText
from realsr_hpc.train import own_codes
from realsr_hpc.train.batches import plain_sequence
from realsr_hpc.train.sft import trace_sequences
from realsr_hpc.train.sft_loss import cross_entropy, images_begun, loss_by_part, means_by_part
from realsr_hpc.vlcot.vocabulary import Vocabulary
from tests.steps import small_parts

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


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_weighted_cross_entropy_over_the_global_count_plus_z_loss(weight):
    """Before the first image a token has the weight of perception; padded vocabulary rows have no probability."""
    policy = SimpleNamespace(vocab_size=896, padded_vocab_size=900, groups=SimpleNamespace(tp=None, device="cpu"))
    tokens = torch.tensor([4, 5, *trace(3)])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(tokens), 8, generator=generator)
    rows = torch.randn(900, 8, generator=generator)
    sequence = plain_sequence(tokens, first=2)
    sft = SFTConfig(z_loss=0.01, perception_weight=weight)
    value, outputs = cross_entropy(policy, VOCABULARY, 100, sft)(
        hidden, rows, Microbatch(tokens[None], loss=sequence.loss)
    )
    logits = hidden[0, 1:-1] @ rows.T
    losses = torch.nn.functional.cross_entropy(logits[:, :896], tokens[2:], reduction="none")
    weights = torch.where(torch.arange(len(losses)) < 3, weight, 1.0)
    expected, z_loss = (weights * losses).sum() / 100, 0.01 * logits.logsumexp(-1).square().sum() / 100
    torch.testing.assert_close(outputs, {"sft/loss/mean": expected, "sft/z_loss/mean": z_loss})
    torch.testing.assert_close(value, expected + z_loss)


def test_responses_are_learnt_and_prompts_and_images_without_captions_are_not():
    tokens = small_parts().tokens
    rng, nothing = np.random.default_rng(0), DegradationLabel("light", "keep", "heavy", "light", "keep")
    lq, gt = (torch.from_numpy(rng.integers(0, 255, (2, 3, side, side), np.uint8)) for side in (24, 96))
    scene = SceneText("a", "b", "c", ("a",))
    batch = LQBatch(lq, gt, (nothing, nothing), (None, scene), ("x", "y"), torch.arange(2))
    [sequence] = trace_sequences(tokens, batch)
    prompt, response = tokens.prompts(lq)[1], tokens.responses(batch)[1]
    assert sequence.tokens.tolist() == [*prompt.tolist(), *response]
    assert sequence.loss.targets.tolist() == response and int(sequence.loss.positions[0]) == len(prompt) - 1


def test_a_share_of_the_updates_reads_own_codes(monkeypatch):
    """Which codes are drawn, how often, at which temperature and noise; different for each update and rank."""
    passes: list[tuple[int, float, bytes]] = []

    def drawn(parts, microbatches, keys, temperature):
        passes.append((step, temperature, b"".join(key.numpy().tobytes() for key in keys)))
        return microbatches

    monkeypatch.setattr(own_codes, "drawn_once", drawn)
    microbatches = [Microbatch(torch.zeros(1, 9), loss=plain_sequence(torch.arange(9), 1).loss)] * 2
    sft, policy = SFTConfig(own_codes=0.25, own_codes_passes=3), SimpleNamespace(eval=lambda: None)
    found = []
    for rank in range(2):
        parts = SimpleNamespace(
            config=SimpleNamespace(sft=sft, seed=7),
            policy=policy,
            groups=SimpleNamespace(dp_rank=rank, dp_size=2),
        )
        for step in range(200):
            own_codes.with_own_codes(parts, microbatches, step)
        found.append(list(passes))
        passes.clear()
    steps = [step for step, _, _ in found[0]]
    assert 30 < len(set(steps)) < 70 and {steps.count(step) for step in steps} == {1, 2, 3}
    temperatures = [temperature for _, temperature, _ in found[0]]
    assert 0.05 <= min(temperatures) < 0.15 and 0.9 < max(temperatures) <= 1
    assert [(step, t) for step, t, _ in found[0]] == [(step, t) for step, t, _ in found[1]]
    noise = {(step, key) for ranks in found for step, _, key in ranks}
    assert len(noise) == 2 * len(set(steps)) == len({key for _, key in noise})
    assert all(key[: len(key) // 2] != key[len(key) // 2 :] for _, key in noise)
