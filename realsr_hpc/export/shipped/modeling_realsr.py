"""Chameleon that may paint, with the image decoder that transformers leaves out. Self-contained: torch, transformers.

transformers sets every image-code logit of Chameleon to the smallest number, in `generate` and in the training loss;
`RealSRForConditionalGeneration` does not. Load with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

or put this file on the path and import it. `load_decoder(FOLDER)` gives the decoder from codes to pixels, and
`ImageBlockGrammar` keeps what `generate` writes inside an image block well formed.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import ChameleonForConditionalGeneration, LogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

DECODER_FILE, TRACE_FILE = "vq_decoder.safetensors", "realsr.json"
CODE_FILES = ("processing_realsr.py", "images_realsr.py", "modeling_realsr.py")
COMPANIONS = (DECODER_FILE, TRACE_FILE, "tokenizer.json", *CODE_FILES)
OPTIONAL = ("tokenizer_config.json", "recipe.yaml")


class RealSRForConditionalGeneration(ChameleonForConditionalGeneration):
    """Stock Chameleon without the mask over image codes; the weights are the same."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **inputs):
        """As in the stock class; logits [batch, tokens, vocabulary] are those of the output layer, untouched."""
        inputs["return_dict"] = True
        outputs = self.model(input_ids=input_ids, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def load_decoder(source, **options):
        """The image decoder of the export; see the function of that name."""
        return load_decoder(source, **options)

    def save_pretrained(self, save_directory, *arguments, **options):
        """Save as usual, and copy the other files that restoring needs from where this model was loaded."""
        super().save_pretrained(save_directory, *arguments, **options)
        if not options.get("is_main_process", True):
            return
        revision = getattr(self.config, "_commit_hash", None)
        for name in (*COMPANIONS, *OPTIONAL):
            needed = name in COMPANIONS
            path = cached_file(self.name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=needed)
            if path is not None and Path(path).resolve() != (Path(save_directory) / name).resolve():
                shutil.copyfile(path, Path(save_directory) / name)


class ImageBlockGrammar(LogitsProcessor):
    """Logits processor for `generate`: text outside image blocks; inside, tokens without a choice are forced.

    An image block is begin, size, size, rows of codes each closed by a newline, end. `trace` is realsr.json.
    """

    def __init__(self, trace, prompt_tokens):
        """`prompt_tokens`: length of the (equally long) prompts; the grammar starts behind them."""
        self.trace, self.prompt_tokens = trace, prompt_tokens
        block = trace["codes_in_block"]
        self.codes = torch.tensor(
            [*range(4, 4 + block), *range(trace["vocab_size"] - trace["num_codes"] + block, trace["vocab_size"])]
        )
        self.text = torch.arange(trace["text_first"], trace["text_first"] + trace["num_text"])
        self.sizes = torch.tensor([trace["size_zero"] + size // 32 for size in trace["image_sizes_px"]])

    def __call__(self, input_ids, scores):
        """Scores [batch, vocabulary], -inf for tokens that must not follow."""
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            allowed[row, self.next_tokens(tokens).to(scores.device)] = True
        return scores.masked_fill(~allowed, -torch.inf)

    def next_tokens(self, response):
        """Ids that may follow the response so far."""
        trace = self.trace
        begins = [position for position, token in enumerate(response) if token == trace["image_begin"]]
        if not begins or trace["image_end"] in response[begins[-1] :]:
            more = [trace["end_turn"]] if len(begins) == 3 else [trace["end_turn"], trace["image_begin"]]
            return torch.cat([self.text, torch.tensor(more)])
        body = response[begins[-1] + 1 :]
        if not body:
            return self.sizes
        if len(body) == 1:
            return torch.tensor(body)
        side = 32 * (body[0] - trace["size_zero"]) // trace["downsample"]
        row, column = divmod(len(body) - 2, side + 1)
        if row == side:
            return torch.tensor([trace["image_end"]])
        return torch.tensor([trace["newline"]]) if column == side else self.codes


def group_norm(channels, present):
    """GroupNorm with 32 groups, or the identity."""
    return nn.GroupNorm(32, channels, eps=1e-6) if present else nn.Identity()


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice."""

    def __init__(self, channels_in, channels_out, norm):
        super().__init__()
        self.norm1 = group_norm(channels_in, norm)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, norm)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, hidden):
        """[B, C, h, w] -> [B, D, h, w]."""
        branch = self.conv1(F.silu(self.norm1(hidden)))
        return self.conv2(F.silu(self.norm2(branch))) + self.nin_shortcut(hidden)


class SpatialAttention(nn.Module):
    """Single-head self-attention over positions."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = group_norm(channels, norm)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden):
        """Input plus attention output."""
        normed = self.norm(hidden)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return hidden + self.proj_out(mixed.transpose(1, 2).reshape(hidden.shape))


def middle_blocks(channels, norm):
    """Residual block, attention, residual block; only a container with taming-transformers' names."""
    mid = nn.Module()
    mid.block_1 = ResidualBlock(channels, channels, norm)
    mid.attn_1 = SpatialAttention(channels, norm)
    mid.block_2 = ResidualBlock(channels, channels, norm)
    return mid


class ImageDecoder(nn.Module):
    """Codes to pixels: codebook, post_quant_conv and taming-transformers' decoder."""

    def __init__(
        self,
        codebook,
        latent_channels,
        base_channels,
        channel_multiplier,
        num_res_blocks,
        output_shuffle,
        norm,
        patch_px,
        lowest_attention=False,
    ):
        """codebook: [codes, features]; patch_px: side of the patch that is projected linearly from each latent, or
        None.

        lowest_attention: attention after each block of the lowest resolution (LlamaGen).
        """
        super().__init__()
        self.register_buffer("codebook", codebook)
        self.post_quant_conv = nn.Conv2d(codebook.shape[1], latent_channels, 1)
        widths = [base_channels * m for m in channel_multiplier]
        decoder = self.decoder = nn.Module()
        decoder.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        decoder.mid = middle_blocks(widths[-1], norm)
        decoder.up = nn.ModuleList()
        for index, (wide_in, wide_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = nn.Module()
            inputs = [wide_in] + [wide_out] * num_res_blocks
            level.block = nn.ModuleList(ResidualBlock(width, wide_out, norm) for width in inputs)
            attended = inputs if lowest_attention and index == len(widths) - 1 else []
            level.attn = nn.ModuleList(SpatialAttention(wide_out, norm) for _ in attended)
            if index:
                level.upsample = nn.Module()
                level.upsample.conv = nn.Conv2d(wide_out, wide_out, 3, padding=1)
            decoder.up.append(level)
        decoder.norm_out = group_norm(widths[0], norm)
        decoder.conv_out = nn.Conv2d(widths[0], 3 * output_shuffle**2, 3, padding=1)
        if patch_px:
            decoder.patch_out = nn.Conv2d(latent_channels, 3 * patch_px**2, 3, padding=1)
        self.output_shuffle, self.patch_px = output_shuffle, patch_px

    @torch.no_grad()
    def forward(self, codes):
        """codes int64 [B, h, w] -> RGB in [-1, 1], [B, 3, H, W]."""
        decoder = self.decoder
        latents = self.post_quant_conv(self.codebook[codes].movedim(-1, 1))
        hidden = decoder.conv_in(latents)
        hidden = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(hidden)))
        for level in reversed(decoder.up):
            for number, block in enumerate(level.block):
                hidden = block(hidden)
                if len(level.attn):
                    hidden = level.attn[number](hidden)
            if hasattr(level, "upsample"):
                hidden = level.upsample.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        pixels = F.pixel_shuffle(decoder.conv_out(F.silu(decoder.norm_out(hidden))), self.output_shuffle)
        if self.patch_px:
            pixels = pixels + F.pixel_shuffle(decoder.patch_out(latents), self.patch_px)
        return pixels.clamp(-1, 1)


def load_decoder(source, **options):
    """The image decoder of an export (a folder, or a repository of the Hub), frozen, float32, on the CPU."""
    weights = load_file(cached_file(str(source), DECODER_FILE, **options))
    weights = {name: value.float() for name, value in weights.items() if name != "quantize.embedding.weight"}
    shape = json.loads(Path(cached_file(str(source), TRACE_FILE, **options)).read_text(encoding="utf-8"))["decoder"]
    decoder = ImageDecoder(torch.empty_like(weights["codebook"]), **shape)
    decoder.load_state_dict(weights)
    return decoder.requires_grad_(False).eval()
