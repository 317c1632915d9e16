"""Chameleon as a Megatron layer spec: RMSNorm, rotary embeddings, SwiGLU, and a LayerNorm with bias per head on q, k.

Every variant, with Transformer Engine or without, has the same module names (input_layernorm,
self_attention.linear_qkv, ...), so that weights, checkpoints and the decode loop need not distinguish them.
"""

from __future__ import annotations

from typing import Any  # Megatron's layer specifications and sharded states have no types

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.attention import SdpaAttention
from realsr_hpc.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from realsr_hpc.model.precision import precision_arguments
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.parallel.process_groups import ProcessGroups

HEAD_NORM_EPSILON = 1e-5
_UNFUSED: dict[str, Any] = dict.fromkeys(
    (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
    ),
    False,
)
"""Megatron's fused kernels are off: the same layers must run on a CPU."""


def transformer_config(config: RunConfig, groups: ProcessGroups) -> TransformerConfig:
    """Megatron's configuration of the model under the layout of `groups`."""
    model, parallel = config.model, config.parallel
    virtual = parallel.virtual_pp if parallel.virtual_pp > 1 else None
    on_cpu = groups.device.type == "cpu"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=kv_heads(model),
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        # true would make Megatron sum every gradient named q_layernorm over tp: wrong for per-head weights
        qk_layernorm=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        # gradients are sums over tokens; the loss function has divided by the global token count
        calculate_per_token_loss=True,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        # on gloo the batched form is silently wrong for interleaved stages
        batch_p2p_comm=not on_cpu,
        deallocate_pipeline_outputs=True,
        **_UNFUSED,
        **_recompute_arguments(parallel.recompute),
        **precision_arguments(config.precision, model.num_layers),
    )


def _recompute_arguments(recompute: str) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":  # flash attention stores little; the MLP's activations take most of the memory
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm, tagged so that its gradient is summed over tp under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        device = "cpu" if config.use_cpu_initialization else "cuda"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_parameter_device(device))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def _parameter_device(device: str) -> torch.device:
    """The default device if the caller set it to `meta`, else `device`."""
    default = torch.get_default_device()
    return default if default.type == "meta" else torch.device(device)


class _HeadNorm(torch.nn.Module):
    """LayerNorm over the head dimension with weight and bias of each head; heads are sharded over tp."""

    def __init__(self, heads: int, hidden_size: int, config: TransformerConfig) -> None:
        super().__init__()
        shape = (heads // config.tensor_model_parallel_size, hidden_size)
        device = _parameter_device("cpu" if config.use_cpu_initialization else "cuda")
        self.weight = torch.nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
        for parameter in (self.weight, self.bias):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., heads/tp, head_dim] -> the same shape."""
        normalised = F.layer_norm(x, x.shape[-1:], None, None, HEAD_NORM_EPSILON)
        return normalised * self.weight + self.bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron's description of this rank's shards of the whole weights."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0, "bias": 0}, sharded_offsets
        )


class QNorm(_HeadNorm):
    """Norm of the queries, before the rotary embedding."""

    def __init__(self, hidden_size: int, config: TransformerConfig, **_: object) -> None:
        super().__init__(config.num_attention_heads, hidden_size, config)


class KNorm(_HeadNorm):
    """Norm of the keys, before the rotary embedding."""

    def __init__(self, hidden_size: int, config: TransformerConfig, **_: object) -> None:
        super().__init__(config.num_query_groups or config.num_attention_heads, hidden_size, config)


class SwinLayer(TransformerLayer):
    """A layer with its norms after attention and MLP: x + norm(attention(x)), then y + norm(mlp(y)).

    Source: `swin_norm` of facebookresearch/chameleon `inference/transformer.py`. The modules, and so the names of the
    weights, are those of the plain layer; attention and MLP return sums over tp, which the norms need.
    """

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, None]:
        # [S, b, H]; of Megatron's arguments those that `SdpaAttention` and rotary embeddings read
        given = {name: named.get(name) for name in ("attention_mask", "rotary_pos_emb", "attention_bias")}
        attended, _ = self.self_attention(hidden_states, **given)
        return hidden_states + self.input_layernorm(attended), None

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def _forward_post_mlp(self, mlp_output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        output, bias = mlp_output_with_bias
        return super()._forward_post_mlp((self.pre_mlp_layernorm(output), bias), residual)  # pyright: ignore[reportReturnType]


def block_spec(
    num_layers: int, transformer_engine: bool | None = None, emulated_fp8: bool = False, swin_norm: bool = False
) -> TransformerBlockSubmodules:
    """Spec of `num_layers` layers and the final norm; with Transformer Engine's linear layers and norms if installed.

    emulated_fp8: linear layers that can round their operands, even if Transformer Engine is installed. swin_norm:
    layers of `SwinLayer`.
    """
    if transformer_engine is None:
        transformer_engine = backend.has_transformer_engine()
    modules = _torch_modules()
    if emulated_fp8:
        modules = (RMSNorm, Fp8ColumnParallelLinear, Fp8RowParallelLinear)
    elif transformer_engine:
        modules = _transformer_engine_modules()
    layer = _layer_spec(*modules, SwinLayer if swin_norm else TransformerLayer)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=modules[0])  # pyright: ignore[reportArgumentType]


def _torch_modules() -> tuple[Any, Any, Any]:
    return RMSNorm, ColumnParallelLinear, RowParallelLinear


def _transformer_engine_modules() -> tuple[Any, Any, Any]:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

    return TENorm, TEColumnParallelLinear, TERowParallelLinear


def _layer_spec(norm: Any, column: Any, row: Any, layer: type[TransformerLayer]) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            # the same attention kernels on every device and for branched rows
            core_attention=SdpaAttention,  # pyright: ignore[reportArgumentType]
            linear_proj=row,
            q_layernorm=QNorm,
            k_layernorm=KNorm,
        ),
    )
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )
