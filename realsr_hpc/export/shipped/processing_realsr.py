"""Pictures to prompts and responses to pictures, for an export of realsr_hpc. Self-contained: numpy, torch, tokenizers.

transformers' own Chameleon processor makes a fixed 512 px crop without size and row tokens, which this model never saw.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

PLACEHOLDER = "<|image|>"


class RealSRProcessor:
    """`prompt(model, images)` -> input_ids; `parse(response)` -> texts and code grids."""

    def __init__(self, folder):
        """`folder`: the export."""
        folder = Path(folder)
        self.trace = json.loads((folder / "realsr.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # a text that spells a special token stays text

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
