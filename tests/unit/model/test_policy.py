"""The policy in one process: against transformers' Chameleon, packed, frozen, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from realsr_hpc.config.schema import ModelConfig, ParallelConfig, RunConfig
from realsr_hpc.formats import open_source
from realsr_hpc.model.attention import segment_mask
from realsr_hpc.model.hf_mapping import hf_names, hf_to_local, local_to_hf
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.model.spec import block_spec
from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
from realsr_hpc.parallel.process_groups import ProcessGroups, initialise

VOCAB = 256
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, init_std=0.15)
CONFIG = RunConfig(name="t", task="grpo", model=MODEL)


@pytest.fixture(scope="module")
def groups() -> ProcessGroups:
    torch.set_num_threads(1)
    return initialise(ParallelConfig(), seed=0)


@pytest.fixture(scope="module", params=[False, True], ids=["norms before", "norms after"])
def chameleon(request: pytest.FixtureRequest) -> Any:
    """transformers' own class, with its norms before attention and MLP or after them."""
    from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators

    declare_torchvision_operators()  # before transformers looks for torchvision
    import transformers

    codes = {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 10 + i for i in range(32)}
    vq = {
        "embed_dim": 8, "num_embeddings": 32, "latent_channels": 8, "resolution": 16, "base_channels": 32,
        "channel_multiplier": [1], "num_res_blocks": 1,
    }  # fmt: skip
    config = transformers.ChameleonConfig(
        vocab_size=VOCAB,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        rms_norm_eps=MODEL.norm_epsilon,
        swin_norm=request.param,
        vq_config=vq,
        vocabulary_map={"<s>": 0, "</s>": 2, "<image>": 3, "<racm3:break>": 4, "<eoss>": 5, **codes},
        model_parallel_size=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        elif "proj" in name:
            parameter.data.mul_(8)
    return model


def hidden_states(policy: Policy, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    def keep(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return hidden.sum(), {"hidden": hidden}

    return run_pipeline(policy, [Microbatch(tokens, segment_ids)], keep, forward_only=True)[0]["hidden"]


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(50, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal_those_of_transformers(groups: ProcessGroups, chameleon: Any, tmp_path: Path) -> None:
    chameleon.save_pretrained(tmp_path)
    model = MODEL.model_copy(update={"swin_norm": chameleon.config.swin_norm})
    policy = build_policy(CONFIG.model_copy(update={"model": model}), groups, VOCAB, trainable=False)
    hf_to_local(open_source(tmp_path).policy.read, policy)
    tokens = some_tokens(2, 24)
    with torch.no_grad():
        theirs = chameleon.lm_head(chameleon.model(input_ids=tokens).last_hidden_state)
        ours = hidden_states(policy, tokens) @ policy.output_weight.T
    assert theirs.abs().max() > 0.2
    assert (ours - theirs).abs().max() < 1e-5
    saved = load_file(tmp_path / "model.safetensors")
    saved = {name.replace("model.language_model.", "model."): tensor for name, tensor in saved.items()}
    exported = local_to_hf(policy)
    assert list(exported) == hf_names(policy.shapes)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())


def test_shared_head_norms_are_spread_and_wrong_shapes_named(groups: ProcessGroups) -> None:
    policy = build_policy(CONFIG, groups, VOCAB)
    weights = local_to_hf(policy)
    name, shared = "model.layers.1.self_attn.q_norm.weight", torch.randn(1, 8)
    hf_to_local((weights | {name: shared}).__getitem__, policy)
    spread = policy.chunks[0].decoder.layers[1].self_attention.q_layernorm.weight
    assert torch.equal(spread, shared.expand(4, -1))
    of_groups = torch.randn(2, 8)  # of neighbouring heads
    hf_to_local((weights | {name: of_groups}).__getitem__, policy)
    assert torch.equal(spread, of_groups[[0, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"q_norm\.weight has shape \(3, 8\), the recipe's model section has \(4, 8"):
        hf_to_local((weights | {name: torch.randn(3, 8)}).__getitem__, policy)


def test_packed_rows_equal_separate_rows(groups: ProcessGroups) -> None:
    """Positions do not restart in a packed row: rotary embeddings depend only on differences."""
    policy = build_policy(CONFIG, groups, VOCAB, trainable=False)
    tokens = some_tokens(1, 20)
    ids = torch.tensor([[0] * 8 + [1] * 12])
    packed = hidden_states(policy, tokens, ids)
    apart = torch.cat([hidden_states(policy, tokens[:, :8]), hidden_states(policy, tokens[:, 8:])], 1)
    assert (packed - apart).abs().max() < 1e-5
    assert (packed - hidden_states(policy, tokens)).abs().max() > 1e-2


def test_segment_mask_by_hand() -> None:
    mask = segment_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_random_weights_follow_the_seed(groups: ProcessGroups) -> None:
    first, again = (build_policy(CONFIG, groups, VOCAB).output_weight for _ in range(2))
    other = build_policy(CONFIG.model_copy(update={"seed": 1}), groups, VOCAB).output_weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.std().item() - MODEL.init_std) < 0.01


def test_frozen_policy_offloads_and_a_trained_one_refuses(groups: ProcessGroups) -> None:
    frozen = build_policy(CONFIG, groups, VOCAB, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.offload(to_host=True)
    assert all(p.device.type == "cpu" for p in frozen.parameters())
    frozen.offload(to_host=False)
    assert all(p.device.type == groups.device.type for p in frozen.parameters())
    with pytest.raises(ValueError, match="trainable=False"):
        build_policy(CONFIG, groups, VOCAB).offload(to_host=True)


def test_full_size_builds_on_the_meta_device(groups: ProcessGroups) -> None:
    model = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008)
    policy = build_policy(CONFIG.model_copy(update={"model": model}), groups, 65536, meta=True)
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert sum(p.numel() for p in policy.parameters()) == 7_013_158_912 + 32 * 4 * 31 * 128


def test_names_the_decode_loop_reads(groups: ProcessGroups) -> None:
    chunk = build_policy(CONFIG, groups, VOCAB).chunks[0]
    layer = chunk.decoder.layers[0]
    head_dim = MODEL.hidden_size // MODEL.num_heads
    assert layer.self_attention.linear_qkv.weight.shape == ((4 + 2 * 2) * head_dim, 32)
    assert layer.self_attention.q_layernorm.bias.shape == (4, head_dim)
    assert layer.self_attention.k_layernorm.weight.shape == (2, head_dim)
    assert layer.self_attention.linear_proj.weight.shape == (32, 32)
    assert layer.mlp.linear_fc1.weight.shape == (2 * 48, 32)
    assert layer.mlp.linear_fc2.weight.shape == (32, 48)
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm, chunk.decoder.final_layernorm)
    assert all(norm.weight.shape == (32,) for norm in norms)
    assert chunk.embedding.word_embeddings.weight.shape == chunk.output_layer.weight.shape == (VOCAB, 32)


def test_transformer_engine_spec_keeps_every_module_name() -> None:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    plain, fast = (block_spec(3, transformer_engine=te).layer_specs for te in (False, True))
    assert len(plain) == len(fast) == 3
    layer, reference = fast[0].submodules, plain[0].submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is TENorm
    assert layer.mlp.submodules.linear_fc1 is layer.self_attention.submodules.linear_qkv is TEColumnParallelLinear
    assert layer.mlp.submodules.linear_fc2 is layer.self_attention.submodules.linear_proj is TERowParallelLinear
    assert layer.self_attention.submodules.core_attention is reference.self_attention.submodules.core_attention


@pytest.mark.parametrize(
    ("shapes", "message"), [([], "is empty"), ([(1, 8), (1, 9)], r"several shapes \[\(1, 8\), \(1, 9\)\]: pad them")]
)
def test_microbatches_that_do_not_fit_are_refused(
    groups: ProcessGroups, shapes: list[tuple[int, int]], message: str
) -> None:
    policy = build_policy(CONFIG, groups, VOCAB, trainable=False)
    batches = [Microbatch(some_tokens(*shape)) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        run_pipeline(policy, batches, lambda h, w, m: (h.sum(), {}), forward_only=True)
