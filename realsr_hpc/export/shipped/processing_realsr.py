"""Pictures to prompts and responses to pictures, for an export of realsr_hpc. Self-contained: torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    processor.restore(model, Image.open("lq.png")).save("sr.png")

transformers' own Chameleon processor makes a fixed 512 px crop without size and row tokens, which this model never saw.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, ProcessorMixin

PLACEHOLDER = "<|image|>"
STAGES = ("rough", "middle", "final")
FIELDS = ("degradation", *(f"{stage}_{kind}" for stage in STAGES for kind in ("understand", "image")))


class RealSRProcessor(ProcessorMixin):
    """`restore(model, image)` does it all; `prompt(model, images)` and `parse(response)` are its ends."""

    attributes = []  # what transformers' processors are made of; this one reads its files itself

    def __init__(self, folder):
        """`folder`: the export."""
        self.folder = folder = Path(folder)
        self.trace = json.loads((folder / "realsr.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # a text that spells a special token stays text

    @classmethod
    def from_pretrained(cls, folder, **_):
        """What `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)` calls."""
        return cls(folder)

    @torch.no_grad()
    def restore(self, model, image, details=False, **sampling):
        """PIL image of any size -> restored PIL image, a square; with `details`, also the fields of its trace.

        The image is shown to the model as one square, as in training: tile larger photographs before. `sampling` goes
        to `generate` (do_sample=False, temperature=..., ...); its defaults are generation_config.json's.
        """
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)[None]
        prompt = self.prompt(model, pixels)
        grammar = TraceGrammar(self)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=LogitsProcessorList([grammar]),
            **{"max_new_tokens": grammar.longest, **sampling},
        )
        fields = self.parse(tokens[0, prompt.shape[1] :])
        codes = torch.from_numpy(fields["final_image"])[None]
        decoded = ((model.load_decoder(self.folder)(codes)[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        restored = Image.fromarray(decoded.movedim(0, -1).numpy())
        return (restored, fields) if details else restored

    @torch.no_grad()
    def prompt(self, model, images):
        """uint8 RGB images [B, 3, h, w] -> input_ids [B, P], with the model's own image encoder."""
        size = self.trace["lq_size_px"]
        pixels = images.float() / 127.5 - 1.0
        if images.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
        parameter = next(model.model.vqmodel.parameters())
        pixels = pixels.clamp(-1, 1).to(parameter.device, parameter.dtype)
        tokens = model.get_image_tokens(pixels).view(len(images), size // self.trace["downsample"], -1)
        return torch.tensor([self._prompt(grid) for grid in tokens.tolist()], device=parameter.device)

    def parse(self, response):
        """Response ids -> {tag: text, or int64 [rows, columns] codes of a complete image}; nothing is raised."""
        text, grids = self._linearise([int(token) for token in response])
        fields = {}
        for name, body in re.findall(r"<(\w+)>(.*?)</\1>", text, re.DOTALL):
            mark = re.fullmatch("\ue000(\\d+)\ue001", body)
            value = grids[int(mark.group(1))] if mark else body
            if value is not None:
                fields[name] = value
        return fields

    def _prompt(self, grid):
        """grid: token ids [side][side]."""
        trace = self.trace
        before, after = trace["instruction"].split(PLACEHOLDER, 1)
        size = trace["size_zero"] + len(grid) * trace["downsample"] // 32
        image = [trace["image_begin"], size, size]
        for row in grid:
            image += [*row, trace["newline"]]
        image.append(trace["image_end"])
        return [trace["bos"], *self._encode(before), *image, *self._encode(after), trace["end_turn"]]

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _linearise(self, tokens):
        """Text with a numbered mark for every image block, and the blocks' code grids (None: malformed)."""
        trace, parts, grids, position = self.trace, [], [], 0
        last_text = trace["text_first"] + trace["num_text"]
        while position < len(tokens) and tokens[position] != trace["end_turn"]:
            if tokens[position] == trace["image_begin"]:
                end = position + 1
                while end < len(tokens) and tokens[end] != trace["image_end"]:
                    end += 1
                parts.append(f"\ue000{len(grids)}\ue001")
                grids.append(self._grid(tokens[position + 1 : end]))
                position = end + 1
                continue
            start = position
            while position < len(tokens) and trace["text_first"] <= tokens[position] < last_text:
                position += 1
            parts.append(self.tokenizer.decode(tokens[start:position], skip_special_tokens=False))
            position += position == start
        return "".join(parts), grids

    def _grid(self, body):
        """size, size, rows -> codes; None where they do not fit."""
        side = 32 * (body[0] - self.trace["size_zero"]) // self.trace["downsample"] if body else 0
        if side <= 0 or len(body) != 2 + side * (side + 1):
            return None
        rows = np.array(body[2:]).reshape(side, side + 1)[:, :-1]
        block, first_far = self.trace["codes_in_block"], self.trace["vocab_size"] - self.trace["num_codes"]
        codes = np.where((rows >= 4) & (rows < 4 + block), rows - 4, rows - first_far)
        near = (rows >= 4) & (rows < 4 + block)
        far = (rows >= first_far + block) & (rows < self.trace["vocab_size"])
        return codes if (near | far).all() else None


class TraceGrammar(LogitsProcessor):
    """For `generate`: keeps a response a whole trace, whatever the weights. Make a new one for every call.

    Tags, sizes, newlines and brackets are forced, the degradation is one of its 243 phrases, text runs to its closing
    tag. Equal to realsr_hpc's own constrained grammar.
    """

    def __init__(self, processor):
        """`processor`: the export's."""
        self.processor, self.trace = processor, processor.trace
        trace, decode = self.trace, processor.tokenizer.decode
        first, block, size = trace["text_first"], trace["codes_in_block"], trace["vocab_size"]
        self.codes = [*range(4, 4 + block), *range(size - trace["num_codes"] + block, size)]
        texts = range(first, first + trace["num_text"])
        self.texts = [token for token in texts if "<" not in decode([token], skip_special_tokens=False)]
        self.walks = None

    @property
    def longest(self):
        """Tokens of the longest trace."""
        tags = sum(len(self.encode(tag)) for name in FIELDS for tag in (f"<{name}>", f"</{name}>"))
        phrase = max(len(self.encode(phrase)) for phrase in degradation_phrases())
        sides = [size // self.trace["downsample"] for size in self.trace["image_sizes_px"]]
        images = sum(side * (side + 1) + 4 for side in sides)
        return tags + phrase + images + 3 * self.trace["max_text_tokens"] + 1

    def __call__(self, input_ids, scores):
        """Scores [batch, vocabulary] with everything that may not follow at -inf."""
        if self.walks is None:
            self.walks = [self.walk() for _ in input_ids]
            allowed = [next(walk) for walk in self.walks]
        else:
            last = input_ids[:, -1].tolist()
            allowed = [self._advance(walk, token) for walk, token in zip(self.walks, last, strict=True)]
        barred = torch.ones_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(allowed):
            barred[row, torch.tensor(tokens, device=scores.device)] = False
        return scores.masked_fill(barred, -torch.inf)

    def _advance(self, walk, token):
        try:
            return walk.send(token)
        except StopIteration:  # complete: what `generate` pads with
            return [self.trace["end_turn"]]

    def encode(self, text):
        """Token ids."""
        return self.processor.tokenizer.encode(text, add_special_tokens=False).ids

    def walk(self):
        """Yields what may come next, is sent what came."""
        trace = self.trace
        yield from self._forced(self.encode("<degradation>"))
        yield from self._phrase()
        for stage, pixels in zip(STAGES, trace["image_sizes_px"], strict=True):
            yield from self._forced(self.encode(f"<{stage}_understand>"))
            yield from self._text(self.encode(f"</{stage}_understand>"))
            size = trace["size_zero"] + pixels // 32
            yield from self._forced([*self.encode(f"<{stage}_image>"), trace["image_begin"], size, size])
            side = pixels // trace["downsample"]
            for _ in range(side):
                for _ in range(side):
                    yield self.codes
                yield [trace["newline"]]
            yield from self._forced([trace["image_end"], *self.encode(f"</{stage}_image>")])
        yield [trace["end_turn"]]

    def _forced(self, tokens):
        for token in tokens:
            yield [token]

    def _phrase(self):
        closing = self.encode("</degradation>")
        rest = [[*self.encode(phrase), *closing] for phrase in degradation_phrases()]
        while rest[0]:
            token = yield sorted({tokens[0] for tokens in rest})
            rest = [tokens[1:] for tokens in rest if tokens[0] == token]

    def _text(self, closing):
        yield self.texts
        for _ in range(self.trace["max_text_tokens"] - 1):
            if (yield [*self.texts, closing[0]]) == closing[0]:
                break
        else:
            yield closing[:1]
        yield from self._forced(closing[1:])


def degradation_phrases():
    """All texts of the degradation field."""
    levels, resizes = ("light", "medium", "heavy"), ("upsample", "downsample", "keep")
    slots = itertools.product(levels, resizes, levels, levels, resizes)
    return [f"{blur} blur, {one}, {noise} noise, {jpeg} compression, {two}" for blur, one, noise, jpeg, two in slots]
