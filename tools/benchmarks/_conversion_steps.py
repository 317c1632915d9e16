"""The steps of bench conversion that run in processes of their own: a folder of random weights, opening, comparing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from realsr_hpc.config.load import compose_one, to_yaml
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan import parameter_count
from tools.benchmarks._measure import show

PROMPT_TOKENS, GROUP = 64, 2


def overrides(layers: int, hidden: int) -> list[str]:
    """The recipe of Chameleon's 7B in one process, narrower and with fewer layers if asked for."""
    one = ["parallel=single", "parallel.sequence_parallel=false", "cluster=local"]
    width = [f"model.hidden_size={hidden}", f"model.num_heads={hidden // 128}"]
    return ["recipe=sft_7b", *one, f"model.num_layers={layers}", *width, f"model.ffn_hidden_size={hidden * 43 // 16}"]


def starting_from(folder: Path) -> list[str]:
    """Overrides that name an imported folder's files."""
    image, text = folder / "image_tokenizer.safetensors", folder / "tokenizer.json"
    return [f"model.weights={folder}", f"image_tokenizer.weights={image}", f"text_tokenizer.path={text}"]


def parameters(shape: list[str]) -> int:
    """Of the recipe."""
    return parameter_count(compose_one(shape))


def make_source(folder: Path, shape: list[str], shard_bytes: int) -> None:
    """A Hugging Face folder as Lumina-mGPT's: one q and one k norm per layer, no num_key_value_heads, no VQ weights.

    Random weights are drawn shard by shard. The image tokenizer and a small text vocabulary lie beside it.
    """
    from realsr_hpc.export import hf_config
    from realsr_hpc.export.text_files import combined, write_text_files
    from realsr_hpc.export.weight_files import write_weights
    from realsr_hpc.model.chunks import WeightShapes
    from realsr_hpc.model.hf_mapping import hf_shapes
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer
    from realsr_hpc.tokenizer.text import train_text_tokenizer
    from realsr_hpc.vlcot.sequence import FIELDS
    from realsr_hpc.vlcot.vocabulary import build_vocabulary

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    config = compose_one(shape)
    save_image_tokenizer(ImageTokenizer(config.image_tokenizer), folder.parent / "image.safetensors")
    tags = [f"<{name}>" for name in FIELDS] + [f"</{name}>" for name in FIELDS]
    small = folder.parent / "text.json"
    train_text_tokenizer(["a lion on a rock under the sky"] * 3, 320, small, tags)
    text = json.loads(small.read_text(encoding="utf-8"))
    count = len(text["model"]["vocab"]) + len(text["added_tokens"])
    vocabulary = build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, count)
    tree = combined(text, hf_config.special_tokens(vocabulary), vocabulary)
    write_text_files(folder, tree, config.model.max_sequence_tokens)
    settings = hf_config.model_config(config, vocabulary, tree["model"]["vocab"], "bfloat16")
    kept = {name: value for name, value in settings.items() if name not in ("num_key_value_heads", "auto_map")}
    (folder / "config.json").write_text(json.dumps({**kept, "model_type": "chameleon"}), encoding="utf-8")
    shapes = hf_shapes(WeightShapes.of(config.model, vocabulary.size))
    shapes = {
        name: (1, shape[1]) if name.split(".")[-2] in ("q_norm", "k_norm") else shape for name, shape in shapes.items()
    }
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(sizes.values()) == 2 * parameter_count(config), "the published number of parameters"
    write_weights(folder, ((name, _drawn(name, shape)) for name, shape in shapes.items()), sizes, shard_bytes)


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norms about 1, biases small, matrices as wide as keeps logits of a few units."""
    value = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 2 and "norm" not in name:
        return value.normal_(0, 0.05 if name == "lm_head.weight" else 0.02)
    return value.normal_(0.0 if name.endswith("bias") else 1.0, 0.05)


def _opened(overriding: list[str], tokens: int | None = None) -> tuple[RunConfig, Any, Any]:
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.process_groups import initialise
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    config = compose_one([*overriding, "rollout.lookahead=1"])
    if tokens is not None:
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": tokens})})
    groups = initialise(config.parallel, config.seed)
    traces = TraceTokenizer.load(config, groups.device)
    return config, traces, build_policy(config, groups, traces.codec.vocabulary.size, trainable=False)


@torch.no_grad()
def sample(overriding: list[str], tokens: int, output: Path) -> None:
    """Draw from the opened policy; write tokens, what was allowed at each, and our log-probabilities."""
    from realsr_hpc.rollout.sampler import Sampler
    from realsr_hpc.vlcot.grammar import Grammar
    from tools.benchmarks._policy import some_prompts

    config, traces, policy = _opened(overriding, max(1, tokens // GROUP))
    sampler = Sampler(policy, Grammar(traces.codec, "modality"), config.rollout, config.seed)
    (group,) = sampler.generate(some_prompts(traces, 1, PROMPT_TOKENS), GROUP, list(range(GROUP)))
    free = ~group.forced
    rows = torch.cat([group.prompt.expand(GROUP, -1), group.tokens], 1)
    allowed = sampler.masks.allowed[group.mask_ids[free]]
    torch.save({"rows": rows, "free": free, "allowed": allowed, "ours": group.rollout_logprobs[free]}, output)


@torch.no_grad()
def compare(source: Path, drawn: Path, output: Path) -> None:
    """transformers' log-probabilities of those tokens, in bf16 and in float32, beside ours.

    Its model is made without memory; its weights are those of the mapped files, in float32 one layer at a time.
    """
    given = torch.load(drawn, weights_only=True)
    model = _transformers_model(source)
    said = {"ours": given["ours"]}
    for name, dtype in (("transformers", torch.bfloat16), ("float32", torch.float32)):
        hidden = _hidden(model, given["rows"], dtype)[:, PROMPT_TOKENS - 1 : -1][given["free"]]
        logits = (hidden @ model.lm_head.weight.to(dtype).T).float()
        logits = logits.masked_fill(~given["allowed"][:, : logits.shape[1]], -torch.inf)
        chosen = given["rows"][:, PROMPT_TOKENS:][given["free"]]
        said[name] = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    torch.save(said, output)


def _transformers_model(source: Path) -> Any:
    from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators

    declare_torchvision_operators()  # a torchvision for CUDA may stand beside a torch for CPUs
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = ChameleonConfig.from_pretrained(source)
    config.num_key_value_heads = config.num_attention_heads  # its default is the 7B's
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(config).to(torch.bfloat16).eval()  # pyright: ignore[reportArgumentType]
    wanted = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for path in sorted(source.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).expand(wanted[name].shape) for name in file.keys()}  # noqa: SIM118
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    assert all(".vqmodel." in name for name in missing), f"transformers misses {missing[:3]}"
    width = config.hidden_size // config.num_attention_heads
    for module in model.modules():
        if "inv_freq" in module._buffers:
            module.inv_freq = config.rope_theta ** -(torch.arange(0, width, 2) / width)
    return model


def _hidden(model: Any, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, S, H] after the last norm: transformers' forward pass, each layer cast to `dtype` while it computes."""
    text = model.model
    handles = []
    for part in (text.embed_tokens, *text.layers, text.norm):
        before, after = (
            functools.partial(_cast, dict(part.state_dict()), dtype),
            functools.partial(_cast, dict(part.state_dict()), None),
        )
        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    hidden = text(input_ids=rows, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return hidden


def _cast(kept: dict[str, Tensor], dtype: torch.dtype | None, module: torch.nn.Module, *_: object) -> None:
    """Give a layer its mapped weights, cast; None: as they are, so that no copy stays."""
    module.load_state_dict(
        {name: value if dtype is None else value.to(dtype) for name, value in kept.items()}, assign=True
    )


def make_run(run: Path, overriding: list[str]) -> None:
    """A run folder with a checkpoint of the opened policy."""
    from realsr_hpc import checkpoint

    config, _, policy = _opened(overriding)
    run.mkdir()
    plain = config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    (run / "recipe.yaml").write_text(to_yaml(plain), encoding="utf-8")
    state = checkpoint.RunState(0)
    checkpoint.save(run / "checkpoints", 0, policy, None, state, checkpoint.Keep(last=1))


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    from realsr_hpc.export.weight_files import weight_files

    places = weight_files(first), weight_files(second)
    if places[0].keys() != places[1].keys():
        return False
    handles = {path: safe_open(path, framework="pt") for side in places for path in set(side.values())}
    names = places[0]
    return all(torch.equal(*(handles[side[name]].get_tensor(name) for side in places)) for name in names)


def report(said: Path) -> bool:
    """Print how far the log-probabilities are apart; False where ours are further from float32 than bf16 explains."""
    values = torch.load(said, weights_only=True)
    pairs = {
        "ours (bf16), transformers (bf16)": ("ours", "transformers"),
        "ours (bf16), transformers (float32)": ("ours", "float32"),
        "transformers (bf16), transformers (float32)": ("transformers", "float32"),
    }
    gaps = {name: (values[a] - values[b]).abs() for name, (a, b) in pairs.items()}
    rows = [[name, f"{gap.mean():.4f}", f"{gap.max():.4f}"] for name, gap in gaps.items()]
    title = f"log-probabilities of {len(values['ours'])} drawn tokens, mean {values['ours'].mean():.2f} nats"
    show(title, ["apart, nats", "mean", "largest"], rows)
    ours, theirs = (gaps[name].mean() for name in list(pairs)[1:])
    return bool(ours < 2 * theirs + 1e-3)
