"""Image tokenizer: a Chameleon-shaped VQ encoder, and the decoder that transformers does not have.

Encoder and quantiser have exactly the keys and shapes of transformers' `ChameleonVQVAE`. The decoder is that of
taming-transformers (`decoder.*`, `post_quant_conv.*`), from which Chameleon's is derived. It is fully convolutional and
takes any image whose sides are multiples of `downsample`. With `attention: lowest` it is LlamaGen's `VQModel`, under
taming's names for attention after residual blocks (`encoder.down.N.attn.M`, `decoder.up.N.attn.M`). codebook.py learns
the codebook. There is no adversarial loss and no dropout.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from realsr_hpc.config.schema import ImageTokenizerConfig

FEATURES_AT_ONCE = 16384
"""Largest number of features compared with the codebook at once."""


def _norm(channels: int, present: bool = True) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=1e-6) if present else nn.Identity()


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; a 1x1 shortcut where the channel count changes."""

    def __init__(self, channels_in: int, channels_out: int, norm: bool = True) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, norm)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out, norm)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Residual branch plus the (projected) input, [B, C, h, w] -> [B, D, h, w]."""
        branch = self.conv1(functional.silu(self.norm1(hidden)))
        branch = self.conv2(functional.silu(self.norm2(branch)))
        return branch + (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.norm = _norm(channels, norm)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Input plus attention output."""
        normed = self.norm(hidden)
        # positions as tokens: [B, C, h, w] -> [B, h w, C]
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return hidden + self.proj_out(mixed.transpose(1, 2).reshape(hidden.shape))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm)
        self.attn_1 = SpatialAttention(channels, norm)
        self.block_2 = ResidualBlock(channels, channels, norm)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The three layers in order."""
        return self.block_2(self.attn_1(self.block_1(hidden)))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded right and below only (as in taming)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h//2 w//2"]:
        """Halve both sides."""
        return self.conv(functional.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C 2*h 2*w"]:
        """Double both sides."""
        return self.conv(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each optionally followed by attention, and the resampling to the next resolution."""

    def __init__(
        self, channels_in: int, channels_out: int, num_blocks: int, norm: bool = True, attention: bool = False
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, norm) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(SpatialAttention(width, norm) for width in widths[1:] if attention)
        self.channels = widths[-1]

    def forward(self, hidden: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h2 w2"]:
        """Blocks with their attention, then `downsample` or `upsample` where the level has one."""
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if len(self.attn):
                hidden = self.attn[index](hidden)
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return resample(hidden) if resample is not None else hidden


def attended_levels(config: ImageTokenizerConfig, levels: int) -> list[bool]:
    """Whether each level has attention after its blocks, finest level first."""
    return [config.attention == "lowest" and level == levels - 1 for level in range(levels)]


class Encoder(nn.Module):
    """Image to latents; `ChameleonVQVAEEncoder` with `double_latent` False."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in (1, *config.channel_multiplier)]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        attended = attended_levels(config, len(config.channel_multiplier))
        self.down = nn.ModuleList(
            Level(a, b, config.num_res_blocks, attention=attention)
            for a, b, attention in zip(widths[:-1], widths[1:], attended, strict=True)
        )
        for level in self.down[:-1]:
            level.downsample = Downsample(level.channels)  # type: ignore
        channels = self.down[-1].channels
        self.mid = Middle(channels)  # type: ignore
        self.norm_out = _norm(channels)  # type: ignore
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)  # type: ignore
        self.gathers = False
        """Whether the first layers only gather pixels (tokenizer/start.py); `forward` then does so without products."""

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B latent h w"]:
        """Latents at 1/downsample of the size."""
        if self.gathers:
            hidden, levels = self.gathered(images), list(self.down)[-2:]
        else:
            hidden, levels = self.conv_in(images), list(self.down)
        for level in levels:
            hidden = level(hidden)
        return self.conv_out(functional.silu(self.norm_out(self.mid(hidden))))

    def gathered(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The input of the last two levels: channels are the pixels of a block in the order of `places`, then zeros."""
        hidden = images
        for _ in self.down[:-2]:
            blocks = hidden.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h, 2, w, 2]
            hidden = blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # [B, 2, 2, C, h, w] -> [B, 4 C, h, w]
        return functional.pad(hidden, (0, 0, 0, 0, 0, self.conv_in.out_channels - hidden.shape[1]))

    @torch.no_grad()
    def recognise_gathering(self) -> None:
        """Set `gathers` if the weights of the first layers only copy pixels."""
        widths = [3 * 4**depth for depth in range(len(self.down) - 1)]
        if any(level.block for level in self.down) or widths[-1] > self.conv_in.out_channels or len(self.down) < 2:
            return
        layers = [self.conv_in, *(level.downsample.conv for level in self.down[:-2])]  # type: ignore
        wanted = [torch.zeros_like(layer.weight) for layer in layers]
        wanted[0][range(3), range(3), 1, 1] = 1.0
        for weight, width in zip(wanted[1:], widths, strict=False):
            for out, (row, column, channel) in enumerate(places(width)):
                weight[out, channel, row, column] = 1.0
        pairs = zip(layers, wanted, strict=True)
        self.gathers = all(torch.equal(layer.weight, weight) and not layer.bias.any() for layer, weight in pairs)


def places(width: int) -> list[tuple[int, int, int]]:
    """(row, column, channel) of the entries of a 2 x 2 block, in the order in which gathering stacks them."""
    return [(row, column, channel) for row in range(2) for column in range(2) for channel in range(width)]


class Decoder(nn.Module):
    """Latents to image; taming's decoder, optionally ending early in a pixel shuffle and without normalisation."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        widths = [config.decoder_base * m for m in config.decoder_multiplier]
        norm = config.decoder_norm
        self.output_shuffle = config.decoder_output_shuffle
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm)
        inputs = [*widths[1:], widths[-1]]
        blocks = config.num_res_blocks + 1
        attended = attended_levels(config, len(widths))
        self.up = nn.ModuleList(
            Level(a, b, blocks, norm, attention) for a, b, attention in zip(inputs, widths, attended, strict=True)
        )
        for level in self.up[1:]:
            level.upsample = Upsample(level.channels)  # type: ignore
        self.norm_out = _norm(widths[0], norm)
        # the pixel shuffle turns [3 s^2, H/s, W/s] into [3, H, W]
        self.conv_out = nn.Conv2d(widths[0], 3 * self.output_shuffle**2, 3, padding=1)
        self.downsample = config.downsample
        if config.decoder_patch_out:
            self.patch_out = nn.Conv2d(config.latent_channels, 3 * config.downsample**2, 3, padding=1)

    def forward(self, latents: Float[Tensor, "B latent h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about [-1, 1], not clamped."""
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        # [B, 3 s^2, H / s, W / s] -> [B, 3, H, W]
        images = functional.pixel_shuffle(self.conv_out(functional.silu(self.norm_out(hidden))), self.output_shuffle)
        if hasattr(self, "patch_out"):
            images = images + functional.pixel_shuffle(self.patch_out(latents), self.downsample)
        return images


class Quantizer(nn.Module):
    """Finds the nearest codebook entry; with `normalised` by angle, among entries of unit length (LlamaGen)."""

    def __init__(self, codebook_size: int, embed_dim: int, normalised: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, embed_dim)
        self.normalised = normalised

    def codebook(self) -> Float[Tensor, "K E"]:
        """The entries that features are compared with."""
        weight = self.embedding.weight
        return functional.normalize(weight, dim=-1) if self.normalised else weight

    def nearest(self, features: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
        """Index of the entry with the smallest squared distance."""
        # |f - e|^2 = |f|^2 + |e|^2 - 2 f e, as one product [n, E] @ [E, K]
        codebook = self.codebook()
        norms = codebook.square().sum(1)
        parts = features.split(FEATURES_AT_ONCE)  # N x K distances of all features would take gigabytes
        return torch.cat([(p.square().sum(1, keepdim=True) + norms - 2 * p @ codebook.T).argmin(1) for p in parts])


class ImageTokenizer(nn.Module):
    """Encoder, quantiser and decoder; images are RGB in [-1, 1]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        _check_architecture(config)
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config.codebook_size, config.embed_dim, config.normalised_codes)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w E"]:
        """The features that are compared with the codebook; ValueError for sides that `downsample` does not divide."""
        height, width = images.shape[-2:]
        if height % self.config.downsample or width % self.config.downsample:
            raise ValueError(
                f"images are {height} x {width} px; both sides must be multiples of downsample = "
                f"{self.config.downsample}: pad or crop them"
            )
        # [B, E, h, w] -> [B, h, w, E]
        features = self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)
        return functional.normalize(features, dim=-1) if self.config.normalised_codes else features

    def quantise(self, features: Float[Tensor, "B h w E"]) -> tuple[Float[Tensor, "B h w E"], Int[Tensor, "B h w"]]:
        """Codebook vectors (gradients pass straight through to `features`) and their indices."""
        codes = self.quantize.nearest(features.detach().flatten(0, 2)).view(features.shape[:3])
        entries = functional.embedding(codes, self.quantize.codebook())
        # straight-through estimator: the value is `entries`, the gradient that of `features`
        return features + (entries - features).detach(), codes

    def reconstruct(self, quantised: Float[Tensor, "B h w E"]) -> Float[Tensor, "B 3 H W"]:
        """Decoder output, not clamped."""
        latents = quantised.permute(0, 3, 1, 2)
        # a CPU's kernels are two bits less exact in channels-last layout, which the permutation leaves
        latents = latents.contiguous() if self.config.decoder_norm else latents
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes of images in [-1, 1]; sides must be multiples of `downsample`, else ValueError."""
        return self.quantise(self.features(images))[1]

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of codes in [0, codebook_size)."""
        return self.reconstruct(functional.embedding(codes, self.quantize.codebook())).clamp(-1, 1)

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B h w"], Float[Tensor, ""]]:
        """Reconstruction (not clamped), codes and commitment loss (the codebook learns by moving averages)."""
        features = self.features(images)
        quantised, codes = self.quantise(features)
        entries = functional.embedding(codes, self.quantize.codebook()).detach()
        return self.reconstruct(quantised), codes, functional.mse_loss(features, entries)


def _check_architecture(config: ImageTokenizerConfig) -> None:
    factor = 2 ** (len(config.channel_multiplier) - 1)
    if factor != config.downsample:
        raise ValueError(
            f"image_tokenizer.channel_multiplier has {len(config.channel_multiplier)} levels, which downsample by "
            f"{factor}, but image_tokenizer.downsample is {config.downsample}: make them agree"
        )
    if config.num_res_blocks == 0 and set(config.channel_multiplier) != {1}:
        raise ValueError("image_tokenizer.num_res_blocks is 0: channel_multiplier must be all ones (nothing widens)")
    if config.base_channels % 32:
        raise ValueError(f"image_tokenizer.base_channels is {config.base_channels}: GroupNorm needs a multiple of 32")
    upsampling = 2 ** (len(config.decoder_multiplier) - 1) * config.decoder_output_shuffle
    if upsampling != config.downsample:
        raise ValueError(
            f"the decoder enlarges by {upsampling}, the encoder reduces by {config.downsample}: give "
            "image_tokenizer.decoder_channel_multiplier 1 + log2(downsample / decoder_output_shuffle) entries"
        )
