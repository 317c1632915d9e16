"""The scorer against plain float64 torch, unsharded and sharded by vocabulary; its memory; agreement with sampling."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist

from realsr_hpc.behaviour.distribution import (
    Truncation,
    guided,
    pack_support,
    project,
    sample,
    truncated_support,
)
from realsr_hpc.behaviour.draws import stream_keys
from realsr_hpc.behaviour.logprobs import TokenScores, behaviour_scores
from tests.distributed.launcher import run_ranks

torch.set_num_threads(1)
NUM_TOKENS, HIDDEN, VOCABULARY = 23, 8, 52


@dataclass
class Case:
    """The inputs of one scoring call; tensors that need gradients are leaves."""

    hidden: torch.Tensor
    weight: torch.Tensor
    unconditional: torch.Tensor
    cfg_scale: torch.Tensor
    targets: torch.Tensor
    mask_table: torch.Tensor
    mask_ids: torch.Tensor
    temperature: torch.Tensor
    support: torch.Tensor

    def scores(self, weight=None, **options) -> TokenScores:
        return behaviour_scores(
            self.hidden,
            self.weight if weight is None else weight,
            self.targets,
            self.mask_table,
            self.mask_ids,
            self.temperature,
            support=pack_support(self.support),
            unconditional_hidden=self.unconditional,
            cfg_scale=self.cfg_scale,
            with_entropy=True,
            with_logsumexp=True,
            **options,
        )

    def reference(self) -> TokenScores:
        """Log-probabilities by definition, over the whole vocabulary at once."""
        conditional, unconditional = self.hidden @ self.weight.T, self.unconditional @ self.weight.T
        logits = unconditional + self.cfg_scale[:, None] * (conditional - unconditional)
        keep = self.mask_table[self.mask_ids] & self.support
        log_p = torch.log_softmax((logits / self.temperature[:, None]).masked_fill(~keep, -torch.inf), -1)
        entropy = torch.stack([-(row[k].exp() * row[k]).sum() for row, k in zip(log_p, keep, strict=True)])
        return TokenScores(log_p.gather(1, self.targets[:, None])[:, 0], entropy, logits.logsumexp(-1))


def make_case(dtype=torch.float64, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    mask_table = torch.rand(4, VOCABULARY, generator=generator) < 0.5
    mask_table[0] = True
    mask_table[3] = torch.arange(VOCABULARY) == 40
    mask_ids = torch.randint(0, 4, (NUM_TOKENS,), generator=generator)
    allowed = mask_table[mask_ids]
    targets = torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]
    support = torch.rand(NUM_TOKENS, VOCABULARY, generator=generator) < 0.7
    support[torch.arange(NUM_TOKENS), targets] = True
    return Case(
        leaf(NUM_TOKENS, HIDDEN),
        leaf(VOCABULARY, HIDDEN),
        leaf(NUM_TOKENS, HIDDEN),
        torch.linspace(0.0, 3.0, NUM_TOKENS, dtype=torch.float64).to(dtype),
        targets,
        mask_table,
        mask_ids,
        torch.linspace(0.5, 1.5, NUM_TOKENS, dtype=torch.float64),
        support,
    )


def objective(scores: TokenScores) -> torch.Tensor:
    """A scalar whose gradient uses every output."""
    weights = torch.linspace(-1, 1, len(scores.logprobs), dtype=scores.logprobs.dtype)
    return (weights * scores.logprobs).sum() + 0.3 * scores.entropy.sum() + 0.1 * scores.logsumexp.square().sum()


@pytest.mark.parametrize("tile", [(1, 0), (7, 0), (1024, 0), (7, 5), (1024, 1), (1024, 51)])
def test_values_and_gradients_equal_plain_softmax(tile):
    case = make_case()
    ours, plain = case.scores(chunk_tokens=tile[0], block_columns=tile[1]), case.reference()
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    leaves = (case.hidden, case.weight, case.unconditional)
    got = torch.autograd.grad(objective(ours), leaves)
    expected = torch.autograd.grad(objective(plain), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_plain_cross_entropy_is_a_mask_of_all_true():
    hidden, weight = torch.randn(9, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(0, VOCABULARY, (9,))
    everything = torch.ones(1, VOCABULARY, dtype=torch.bool)
    first_mask = torch.zeros(9, dtype=torch.long)
    logprobs = behaviour_scores(hidden, weight, targets, everything, first_mask, torch.ones(9)).logprobs
    torch.testing.assert_close(
        -logprobs, torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    )


def test_one_allowed_token_is_exactly_zero_without_gradient():
    case = make_case(torch.float32)
    scores = case.scores()
    forced = case.mask_ids == 3
    assert forced.any()
    assert (scores.logprobs[forced] == 0).all()
    (grad,) = torch.autograd.grad(scores.logprobs[forced].sum(), case.hidden)
    assert grad.abs().max() < 1e-5


def test_a_target_outside_its_mask_has_no_probability():
    case = make_case()
    case.targets[case.mask_ids == 3] = 0
    scores = case.scores()
    assert (scores.logprobs[case.mask_ids == 3] == -torch.inf).all()
    assert scores.logprobs[case.mask_ids != 3].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_scorer_gives_the_samplers_log_probability(dtype, tolerance):
    case = make_case(dtype)
    allowed = case.mask_table[case.mask_ids]
    conditional, unconditional = project(case.hidden, case.weight), project(case.unconditional, case.weight)
    logits = guided(conditional, unconditional, case.cfg_scale.float())
    case.support = truncated_support(logits, allowed, Truncation(top_k=9, top_p=0.9), case.temperature)
    case.targets, sampled = sample(
        logits, allowed, case.temperature, torch.from_numpy(stream_keys(0, 1, len(logits))), case.support
    )
    torch.testing.assert_close(case.scores(chunk_tokens=5).logprobs, sampled, rtol=0, atol=tolerance)


@pytest.mark.parametrize("block_columns", [0, 3])
def test_bf16_inputs_give_fp32_scores_near_float64(block_columns):
    low = make_case(torch.bfloat16)
    ours = low.scores(block_columns=block_columns)
    exact = make_case()
    exact.hidden, exact.weight, exact.unconditional = (
        tensor.detach().double().requires_grad_() for tensor in (low.hidden, low.weight, low.unconditional)
    )
    assert ours.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.logprobs.double(), exact.scores().logprobs, rtol=0.02, atol=0.2)
    objective(ours).backward()
    objective(exact.scores()).backward()
    assert low.weight.grad.dtype == torch.bfloat16
    difference = (low.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert difference < 0.02
    difference = (low.hidden.grad.double() - exact.hidden.grad).norm() / exact.hidden.grad.norm()
    assert difference < 0.01  # blocks are summed in float32


def test_no_tensor_of_tokens_by_vocabulary_lives():
    """The largest tensor of logits that any operation makes is a tile's, in both passes; what is saved has no
    vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    case = make_case(torch.float32)
    chunk, biggest, saved = 4, [0], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                biggest[0] = max(biggest[0], result.numel())
            return result

    packed = pack_support(case.support)
    case.support = torch.zeros(NUM_TOKENS, 0, dtype=torch.bool)
    arguments = (case.hidden, case.weight, case.targets, case.mask_table, case.mask_ids, case.temperature)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Watch():
        scores = behaviour_scores(*arguments, support=packed, chunk_tokens=chunk, with_entropy=True)
        scores.logprobs.sum().backward()
    assert biggest[0] < NUM_TOKENS * VOCABULARY / 2
    assert biggest[0] >= chunk * VOCABULARY
    assert max(tensor.numel() for tensor in saved if len(tensor) == NUM_TOKENS) <= NUM_TOKENS * HIDDEN


def test_wrong_sizes_are_named():
    case = make_case()
    with pytest.raises(ValueError, match="mask_table has 52 columns"):
        case.scores(weight=case.weight[:-1])
    case.temperature = case.temperature[:-1]
    with pytest.raises((ValueError, TypeError), match="temperature"):  # TypeError where shapes are checked at run time
        case.scores()


def test_no_tokens_keep_the_graph():
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    everything = torch.ones(1, VOCABULARY, dtype=torch.bool)
    behaviour_scores(hidden, weight, none, everything, none, torch.zeros(0)).logprobs.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def shard_of_the_case() -> list[np.ndarray]:
    """Runs on each rank: scores and gradients of its vocabulary shard."""
    dist.init_process_group("gloo")
    case = make_case()
    shard = case.weight.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    scores = case.scores(weight=shard, tp_group=dist.group.WORLD, chunk_tokens=6, block_columns=5)
    objective(scores).backward()
    result = [*scores, case.hidden.grad, shard.grad, case.unconditional.grad]
    return [tensor.detach().numpy() for tensor in result]


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_shards_on_gloo_equal_one_process(world_size):
    parts = run_ranks(world_size, shard_of_the_case)
    shards = [[torch.from_numpy(array) for array in parts[rank]] for rank in range(world_size)]

    case = make_case()
    plain = case.reference()
    objective(plain).backward()
    for shard in shards:
        for got, expected in zip(shard[:3], plain, strict=True):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(shard[3] for shard in shards), case.hidden.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.cat([shard[4] for shard in shards]), case.weight.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sum(shard[5] for shard in shards), case.unconditional.grad, rtol=1e-9, atol=1e-10)
