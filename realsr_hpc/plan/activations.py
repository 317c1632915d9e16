"""Temporary memory of a step in bytes: tensors that layers keep for their backward passes, logits, attention masks.

Counted tensor by tensor from the code: model/spec.py and Megatron's layers for activations, behaviour/logprobs.py for
logits. `tools/bench.py memory` compares the result with the memory that a run allocates.
"""

from __future__ import annotations

from realsr_hpc.config.derived import LOGIT_CHUNK_TOKENS
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.plan.sizes import (
    MicrobatchShape,
    guided,
    has_reference,
    scored_at_once,
    truncated,
    vocabulary_size,
    width,
)


def first_stage(config: RunConfig, shape: MicrobatchShape) -> dict[str, float]:
    """Bytes by term that an update adds at its peak on the first pipeline stage, which has the most microbatches in
    flight but no logits."""
    return {
        "activations": _kept(config, shape, _in_flight(config, shape)),
        "one layer's backward pass": _again(config, shape),
        "attention masks": _masks(config, shape, _in_flight(config, shape)),
    }


def last_stage(config: RunConfig, shape: MicrobatchShape) -> dict[str, float]:
    """Bytes by term that an update adds at its peak on the last stage: logits of a chunk, or a recomputed layer."""
    parallel = config.parallel
    in_flight = ((parallel.virtual_pp - 1) * parallel.pp + 1) / parallel.virtual_pp
    # the final norm's input, and its output gathered over tp
    norm = (_norm_bytes(config) - width(config)) / _shared(config) + width(config)
    ends = shape.tokens * config.model.hidden_size * norm
    kept = {
        "activations": _kept(config, shape, in_flight) + ends,
        "attention masks": _masks(config, shape, in_flight),
    }
    logits, again = logit_bytes(config, shape, gradient=True), _again(config, shape)
    return kept | ({"logits of a chunk": logits} if logits > again else {"one layer's backward pass": again})


def scoring(config: RunConfig, shape: MicrobatchShape) -> dict[str, float]:
    """Bytes of computing log-probabilities without gradient: one layer of several microbatches, or their logits."""
    tokens = shape.tokens * scored_at_once(config, shape)
    hidden, ffn, parts = config.model.hidden_size, config.model.ffn_hidden_size, config.parallel.tp
    # the layer's input, residuals and norm; gate and up, silu(gate), up once more, their product
    layer = tokens * width(config) * (4 * hidden / _shared(config) + 5 * ffn / parts)
    # boolean masks; attention's float masks have been freed by then
    masks = _mask_entries(config, shape) * scored_at_once(config, shape)
    logits = logit_bytes(config, shape, gradient=False) + 2 * tokens * hidden * width(config)
    return {"activations": max(layer + masks, logits)}


def gather_buffer(config: RunConfig, shape: MicrobatchShape) -> float:
    """Bytes of Megatron's buffer for inputs gathered over tp under sequence parallelism, which is never freed."""
    if not config.parallel.sequence_parallel:
        return 0.0
    scores = has_reference(config) or (config.task == "grpo" and config.grpo.updates_per_step > 1)
    tokens = shape.tokens * (scored_at_once(config, shape) if scores else 1)
    return tokens * config.model.hidden_size * width(config)


def logit_bytes(config: RunConfig, shape: MicrobatchShape, *, gradient: bool) -> float:
    """Bytes of the largest chunk's logits; with `gradient` also those of the output weight's gradient."""
    hidden = config.model.hidden_size
    shard = vocabulary_size(config) / config.parallel.tp
    streams = 2 if guided(config) else 1
    at_once = 1 if gradient else scored_at_once(config, shape)
    scored = shape.rows // streams * shape.loss_tokens_of_a_row * at_once
    first = min(LOGIT_CHUNK_TOKENS, scored)
    second = min(LOGIT_CHUNK_TOKENS, scored - first)
    alone, left = _bytes_a_logit(config, gradient=gradient)
    size = shard * max(alone * first, left * first + alone * second)
    if gradient and config.model.lora is None:
        # the weight's gradient in float32 and, of bf16 weights, one chunk's share
        size += shard * hidden * (4 if width(config) == 4 else 6)
    if gradient:  # hidden states of the loss tokens
        size += 2 * scored * streams * hidden * width(config)
    return size


def _bytes_a_logit(config: RunConfig, *, gradient: bool) -> tuple[int, int]:
    """Of a chunk: all that is alive together (a logit, its mask, its exponential or gradient), and what a backward pass
    has not yet released when the next chunk begins."""
    if config.task == "sft":  # logits and their softmax, for the z-loss; the gradient, and its copy in bf16
        return 8, 4 + (2 if width(config) == 2 else 0)
    if guided(config) and not gradient:  # both streams' logits and what guidance makes of them
        return 12, 0
    if not gradient:  # a float32 logit, its mask and the mask's inverse
        return 6 + (1 if truncated(config) else 0), 0
    alone = 6 + width(config) + (16 if config.grpo.entropy_weight != 0.0 else 0) + (4 if guided(config) else 0)
    left = 2 + (2 if truncated(config) else 0) + (8 if guided(config) else 0) + (2 if width(config) == 2 else 0)
    return alone, left


def _kept(config: RunConfig, shape: MicrobatchShape, in_flight: float) -> float:
    """Bytes that a stage's layers keep for the backward passes of `in_flight` microbatches."""
    model, parallel = config.model, config.parallel
    inputs = shape.tokens * model.hidden_size * width(config) / _shared(config)
    layer = inputs if parallel.recompute == "full" else layer_bytes(config, shape, parallel.recompute)
    # branched rows have their own rotary angles, which recomputed layers share
    angles = 4 * shape.row_tokens * model.hidden_size / model.num_heads if shape.branches.count > 1 else 0.0
    angles = angles if parallel.recompute == "full" else 0.0
    return in_flight * (model.num_layers / parallel.pp * layer + angles)


def _again(config: RunConfig, shape: MicrobatchShape) -> float:
    """Bytes that one layer's backward pass adds: recomputed activations, and gradients of activations."""
    model = config.model
    kept = 0.0 if config.parallel.recompute == "full" else layer_bytes(config, shape, config.parallel.recompute)
    again = layer_bytes(config, shape, "none") - kept
    gradients = width(config) * (2 * model.hidden_size + model.ffn_hidden_size / config.parallel.tp)
    anew = guided(config) and config.parallel.recompute == "full"
    masks = _mask_entries(config, shape) * (1 + width(config)) if anew else 0.0
    return again + masks + shape.tokens * gradients


def layer_bytes(config: RunConfig, shape: MicrobatchShape, recompute: str) -> float:
    """Bytes that one layer keeps for the backward pass of a microbatch; fused attention keeps no scores."""
    model, tp = config.model, config.parallel.tp
    kv = kv_heads(model) / model.num_heads
    read, product = _read_again(config)
    norms = (2 * (_norm_bytes(config) - width(config)) + read * width(config)) * model.hidden_size
    # q, k, v; normalised q, k, which frozen weights do not need; rotated q, k; the output
    normalised = 0 if model.lora else 1 + kv
    attention = ((1 + 2 * kv) + normalised + (1 + kv) + 1) * model.hidden_size
    # gate and up, silu(gate), up once more (Megatron adds an offset of 0), the product; "selective": all again
    feed_forward = (4 + product) * model.ffn_hidden_size if recompute == "none" else 0
    tokens = shape.tokens * (norms / _shared(config) + width(config) * (attention + feed_forward) / tp)
    lora = config.model.lora
    inner = 0 if lora is None else shape.tokens * lora.rank * len(lora.targets)  # A x, needed for B's gradient
    return tokens + width(config) * (_of_branches(config, shape) + _rotary(config, shape) + inner)


def _read_again(config: RunConfig) -> tuple[int, int]:
    """How many outputs of a layer's two norms, and of the MLP's product, the gradients of trained weights need."""
    lora = config.model.lora
    targets = {"q_proj", "gate_proj", "down_proj"} if lora is None else set(lora.targets)
    readers = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
    return sum(not targets.isdisjoint(names) for names in readers), int("down_proj" in targets)


def _rotary(config: RunConfig, shape: MicrobatchShape) -> float:
    """Number of cosines and sines of queries and keys that each layer keeps; all rows share them."""
    model = config.model
    return 4 * shape.row_tokens * model.hidden_size / model.num_heads


def _of_branches(config: RunConfig, shape: MicrobatchShape) -> float:
    """Number of elements that attention keeps for branched rows beyond plain ones (model/attention.py)."""
    model, streams = config.model, 2 if guided(config) else 1
    prompt, response, count = shape.branches.prompt, shape.branches.response, shape.branches.count
    kv = kv_heads(model) / model.num_heads
    rows, kept, mask = shape.rows / streams, 0.0, 0.0
    if count > 1:
        # q and v of the prompt; k and v of each response with the prompt before them, where k alone would be kept
        kept += rows * ((1 + kv) * prompt + kv * count * (2 * prompt + response))
        # a GPU's kernels need no mask
        mask = 0.0 if config.cluster.gpus_per_node else response * (prompt + response)
    if count > 1 or streams > 1:
        kept += shape.rows * shape.branches.tokens  # outputs, before they are concatenated
    if streams > 1:
        kept += rows * count * response  # the twins' v
    return kept * model.hidden_size / config.parallel.tp + mask


def _norm_bytes(config: RunConfig) -> int:
    """Bytes per element that an RMSNorm keeps: input and output. torch's norm on the CPU keeps the input in float32,
    and for the gradient of a trained weight the quotient."""
    if config.cluster.gpus_per_node:
        return 2 * width(config)
    return (4 if config.model.lora else 8) + width(config)


def _shared(config: RunConfig) -> int:
    """Number of ranks that share the tensors outside of tensor parallelism: tp with sequence parallelism, else 1."""
    return config.parallel.tp if config.parallel.sequence_parallel else 1


def _in_flight(config: RunConfig, shape: MicrobatchShape) -> float:
    """Number of microbatches whose activations the first stage holds; with 1F1B the number of stages."""
    pp, virtual = config.parallel.pp, config.parallel.virtual_pp
    interleaving = 1 + (pp - 1) / (pp * virtual) if virtual > 1 else 1.0
    return max(1, min(pp, shape.count)) * interleaving


def _mask_entries(config: RunConfig, shape: MicrobatchShape) -> float:
    """Elements of a microbatch's attention masks: whole rows if packed, responses if guided, else none."""
    if guided(config):
        return shape.rows / 2 * shape.branches.count * shape.branches.response**2
    return shape.rows * shape.row_tokens**2 if config.task == "sft" and config.sft.packing else 0.0


def _masks(config: RunConfig, shape: MicrobatchShape, in_flight: float) -> float:
    """Bytes of the attention masks. Each layer converts them to the activations' dtype and keeps them; the masks of
    guidance are made in each layer, so that recomputed layers keep none."""
    full = config.parallel.recompute == "full"
    if full and guided(config):
        return 0.0
    layers = 1.0 if full else config.model.num_layers / config.parallel.pp * in_flight
    return _mask_entries(config, shape) * (1 + layers * width(config))
