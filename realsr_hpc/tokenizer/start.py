"""Start weights of a small tokenizer whose encoder has no residual blocks: principal components of patches.

Without residual blocks the encoder's downsampling is linear. It gathers each patch exactly and projects it onto its
principal components; `quant_conv` keeps the strongest. The decoder's `patch_out` starts as the least-squares inverse
from quantised features. Training therefore starts at the quality of vector-quantised components instead of noise.

transformers fixes 32 normalisation groups. Each contains a component, its negative and two constants. The constants
keep normalisation from removing an image's brightness and colour; the pair passes the activation unchanged, because
silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from realsr_hpc.tokenizer.image import ImageTokenizer, places

GROUPS = 32
GROUP = 4
"""Channels of a normalisation group."""
CONSTANT = 3.0
"""Size of the constants beside components of unit variance: the larger, the less normalisation changes."""


@torch.no_grad()
def start_encoder(tokenizer: ImageTokenizer, images: list[Float[Tensor, "B 3 H W"]]) -> None:
    """Set the encoder to principal components; ValueError unless it has 128 channels and no residual blocks."""
    config = tokenizer.config
    if config.num_res_blocks or config.base_channels != GROUPS * GROUP or config.latent_channels < GROUPS:
        raise ValueError(
            f"image_tokenizer.base_channels is {config.base_channels}, num_res_blocks {config.num_res_blocks}, "
            f"latent_channels {config.latent_channels}: starting from principal components needs {GROUPS * GROUP}, 0 "
            f"and at least {GROUPS}"
        )
    _calm(tokenizer)
    layers = [tokenizer.encoder.conv_in] + [level.downsample.conv for level in tokenizer.encoder.down[:-1]]  # pyright: ignore[reportAttributeAccessIssue]
    for layer in layers:
        layer.weight.zero_()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    layers[0].weight[range(3), range(3), 1, 1] = 1.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    width = 3
    # each downsampling layer gathers 2 x 2 places into 4 times the channels, without loss
    for layer in layers[1:-1]:
        for out, (row, column, channel) in enumerate(places(width)):
            layer.weight[out, channel, row, column] = 1.0  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        width *= 4
    tokenizer.encoder.recognise_gathering()
    deviations = _project(tokenizer, layers[-1], width, images)  # pyright: ignore[reportArgumentType]
    _keep_strongest(tokenizer, deviations)


@torch.no_grad()
def start_decoder(tokenizer: ImageTokenizer, images: list[Float[Tensor, "B 3 H W"]]) -> None:
    """Fit `decoder.patch_out` to pixels by least squares over 3 x 3 quantised features; the rest outputs zeros yet."""
    decoder, factor = tokenizer.decoder, tokenizer.config.downsample
    inputs, targets = [], []
    for batch in images:
        quantised = tokenizer.quantise(tokenizer.features(batch))[0].permute(0, 3, 1, 2)
        inputs.append(functional.unfold(quantised, 3, padding=1).transpose(1, 2).flatten(0, 1))
        targets.append(functional.pixel_unshuffle(batch, factor).flatten(2).transpose(1, 2).flatten(0, 1))
    x, y = torch.cat(inputs), torch.cat(targets)  # [N, 9 E] and [N, 3 x downsample^2], one row per latent position
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    ridge = 1e-6 * len(x) * torch.eye(x.shape[1], device=x.device)
    solution = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    width = tokenizer.config.embed_dim
    tokenizer.post_quant_conv.weight.zero_()
    tokenizer.post_quant_conv.weight[range(width), range(width), 0, 0] = 1.0
    decoder.patch_out.weight.zero_()
    decoder.patch_out.weight[:, :width] = solution[:-1].T.unflatten(1, (width, 3, 3))
    decoder.patch_out.bias.copy_(solution[-1])  # pyright: ignore[reportOptionalMemberAccess]
    decoder.conv_out.weight.zero_()


def _project(
    tokenizer: ImageTokenizer, layer: nn.Conv2d, width: int, images: list[Float[Tensor, "B 3 H W"]]
) -> Float[Tensor, " D"]:
    # [N, D]: each row a patch of D = 4 `width` values; eigh returns ascending eigenvalues, so both are flipped
    patches = torch.cat([_patches(tokenizer, batch, width) for batch in images])
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
    deviations, vectors = variances.clamp_min(1e-8).sqrt().flip(0), vectors.flip(1)
    for component in range(GROUPS):
        scaled = vectors[:, component] / deviations[component]
        for value, (row, column, channel) in zip(scaled, places(width), strict=True):
            layer.weight[GROUP * component, channel, row, column] = value
        layer.bias[GROUP * component] = -(mean @ scaled)  # pyright: ignore[reportOptionalSubscript]
    # channels of a group: the component, its negative, and the two constants
    layer.weight[1::GROUP], layer.bias[1::GROUP] = -layer.weight[::GROUP], -layer.bias[::GROUP]  # pyright: ignore[reportOptionalSubscript]
    layer.bias[2::GROUP], layer.bias[3::GROUP] = CONSTANT, -CONSTANT  # pyright: ignore[reportOptionalSubscript]
    return deviations


def _keep_strongest(tokenizer: ImageTokenizer, deviations: Float[Tensor, " D"]) -> None:
    """Features are the first components, each scaled by its deviation relative to the first's."""
    out = tokenizer.encoder.conv_out
    out.weight.zero_()
    scale = ((1 + CONSTANT**2) / 2) ** 0.5
    for component in range(GROUPS):
        out.weight[component, GROUP * component, 1, 1] = scale
        out.weight[component, GROUP * component + 1, 1, 1] = -scale
    tokenizer.quant_conv.weight.zero_()
    for feature in range(tokenizer.config.embed_dim):
        tokenizer.quant_conv.weight[feature, feature] = deviations[feature] / deviations[0]


def _patches(tokenizer: ImageTokenizer, images: Float[Tensor, "B 3 H W"], width: int) -> Float[Tensor, "N D"]:
    # [B, width, 2 h, 2 w] -> [B, width, h, 2, w, 2] -> [B, h, w, 2, 2, width] -> [B h w, 4 width]
    blocks = tokenizer.encoder.gathered(images)[:, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)


def _calm(tokenizer: ImageTokenizer) -> None:
    """Initialise convolutions to preserve variance, without biases; residual branches of the encoder start at zero."""
    for name, layer in tokenizer.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            if name.endswith(("conv2", "proj_out")):
                layer.weight.mul_(0.0 if name.startswith("encoder") else 0.3)
