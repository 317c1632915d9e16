"""Pictures to prompts and responses to pictures, for an export of realsr_hpc. Self-contained: torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    processor.restore(model, Image.open("lq.png")).save("sr.png")

transformers' own Chameleon processor makes a fixed 512 px crop without size and row tokens, which this model never saw.
"""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, ProcessorMixin
from transformers.utils import cached_file

from .images_realsr import COLOUR_FIXES, as_rgb, corrected

PLACEHOLDER = "<|image|>"
STAGES = ("rough", "middle", "final")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
FILES = ("realsr.json", "tokenizer.json", "tokenizer_config.json", "vq_decoder.safetensors", "recipe.yaml")
CODE_FILES = ("processing_realsr.py", "images_realsr.py", "modeling_realsr.py")
FIRST_ROLLOUT = 1 << 40  # restoring never shares draws with training
FIELDS = ("degradation", *(f"{stage}_{kind}" for stage in STAGES for kind in ("understand", "image")))


class RealSRProcessor(ProcessorMixin):
    """`restore(model, image)` does it all; `prompt(model, images)` and `parse(response)` are its ends."""

    attributes = []  # what transformers' processors are made of; this one reads its files itself

    def __init__(self, source, **options):
        """`source`: the export, a folder or the name of a repository of the Hub; `options`: how the Hub is asked."""
        super().__init__()
        self.source = str(source)
        self.options = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        self.trace = json.loads(Path(self._file("realsr.json")).read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(self._file("tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # a text that spells a special token stays text

    @classmethod
    def from_pretrained(cls, source, **options):
        """What `AutoProcessor.from_pretrained(SOURCE, trust_remote_code=True)` calls."""
        return cls(source, **options)

    def save_pretrained(self, folder, **_):
        """Everything but the model: `AutoProcessor.from_pretrained(folder, trust_remote_code=True)` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, *CODE_FILES):
            path = self._file(name, needed=name not in ("recipe.yaml", "tokenizer_config.json"))
            if path is not None and Path(path).resolve() != (folder / name).resolve():
                shutil.copyfile(path, folder / name)
        settings = {
            "processor_class": type(self).__name__,
            "auto_map": {"AutoProcessor": f"processing_realsr.{type(self).__name__}"},
        }
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return [str(path) for path in sorted(folder.iterdir())]

    def _file(self, name, needed=True):
        return cached_file(self.source, name, _raise_exceptions_for_missing_entries=needed, **self.options)

    @torch.no_grad()
    def restore(self, model, image, details=False, seed=None, **sampling):
        """PIL image of any size -> restored PIL image, a square; with `details`, also the fields of its trace.

        The image is shown to the model as one square, as in training: tile larger photographs before. `sampling`:
        temperature, text_temperature, image_top_k, text_top_k, top_p, cfg_scale, and colour, which corrects the result
        by the image; they and the seed are by default those that the run's recipe restores with. With the same ones
        realsr_hpc's own restoring draws the same tokens.
        """
        pixels = torch.from_numpy(np.array(as_rgb(image))).movedim(-1, 0)[None]
        prompt = self.prompt(model, pixels)
        sampler = TraceSampler(self, model, prompt.shape[1], self.trace["seed"] if seed is None else seed, **sampling)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler leaves one token each
                max_new_tokens=sampler.longest,
                eos_token_id=self.trace["end_turn"],
                pad_token_id=self.trace["end_turn"],
            ),
        )
        fields = self.parse(tokens[0, prompt.shape[1] :])
        codes = torch.from_numpy(fields["final_image"])[None]
        decoder = model.load_decoder(self.source, **self.options)
        decoded = ((decoder(codes)[0].float() + 1) * 127.5).round().clamp(0, 255)
        colour, tile_px = sampler.settings["colour"], decoded.shape[-1] // self.trace["upscale"]
        decoded = corrected(decoded, as_rgb(image), colour, tile_px).to(torch.uint8)
        restored = Image.fromarray(decoded.movedim(0, -1).numpy())
        if image.mode in ("RGB", "RGBA", "P", "PA") and "icc_profile" in image.info:  # of RGB, so still the pixels' own
            restored.info["icc_profile"] = image.info["icc_profile"]
        return (restored, fields) if details else restored

    @torch.no_grad()
    def prompt(self, model, images):
        """uint8 RGB images [B, 3, h, w] -> input_ids [B, L], with the model's own image encoder."""
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
    """For `generate`: constrains a response to a well-formed trace. Create a new one for every call.

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
        allowed = self.allowed(input_ids)
        barred = torch.ones_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(allowed):
            barred[row, torch.tensor(tokens, device=scores.device)] = False
        return scores.masked_fill(barred, -torch.inf)

    def allowed(self, input_ids):
        """Ids that may follow each row."""
        if self.walks is None:
            self.walks = [self.walk() for _ in input_ids]
            return [next(walk) for walk in self.walks]
        last = input_ids[:, -1].tolist()
        return [self._advance(walk, token) for walk, token in zip(self.walks, last, strict=True)]

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


class TraceSampler(TraceGrammar):
    """The grammar, and the draw: leaves the drawn token alone, so that `generate` takes it. One row, one call.

    The distribution is realsr_hpc's own, in its order: guidance, grammar, top-k, top-p, temperature; so are the draws.
    """

    def __init__(self, processor, model, prompt_tokens, seed, **sampling):
        """`sampling`: what differs from realsr.json's `restore`."""
        super().__init__(processor)
        self.settings = {**self.trace["restore"], **sampling}
        unknown = sorted(self.settings.keys() - self.trace["restore"].keys())
        if unknown:
            raise TypeError(f"{unknown[0]} is not one of {', '.join(self.trace['restore'])}")
        refuse_wrong(self.settings)
        self.model, self.prompt_tokens = model, prompt_tokens
        raw = np.random.Philox(key=[seed, FIRST_ROLLOUT]).random_raw(self.longest)
        self.keys = raw.view(np.int32).reshape(-1, 2).tolist()
        sizes = [self.trace["size_zero"] + size // 32 for size in self.trace["image_sizes_px"]]
        self.inside = {*self.codes, *sizes, self.trace["newline"], self.trace["image_end"]}
        self.block, self.cache = (0, 0), None

    def __call__(self, input_ids, scores):
        """Scores [1, vocabulary], all but one at -inf."""
        allowed = self.allowed(input_ids)[0]
        is_image = allowed is self.codes
        scale = self.settings["cfg_scale"] if is_image else 1.0
        logits = scores[0].float()
        if scale != 1.0:
            logits = torch.lerp(self._unconditional(input_ids[0]).float(), logits, scale)
        barred = torch.ones_like(logits, dtype=torch.bool)
        barred[torch.tensor(allowed, device=logits.device)] = False
        position = input_ids.shape[1] - self.prompt_tokens
        token = self._draw(logits.masked_fill(barred, -torch.inf), is_image, self.keys[position])
        return torch.full_like(scores, -torch.inf).index_fill_(1, token, 0.0)

    def _draw(self, logits, is_image, key):
        """The token with the largest sum of tempered logit and Gumbel noise."""
        settings = self.settings
        text_temperature = settings["text_temperature"] or settings["temperature"]  # None: as the images'
        temperature = settings["temperature"] if is_image else text_temperature
        most = settings["image_top_k" if is_image else "text_top_k"] or len(logits)
        values = logits.topk(min(most, len(logits))).values
        keep = values > -torch.inf
        if settings["top_p"] < 1.0:
            shares = (values / temperature).softmax(-1)
            keep &= shares.cumsum(-1) - shares < settings["top_p"]
        least = values.masked_fill(~keep, torch.inf).amin()
        above, tied = logits > least, logits == least  # of equal logits the first survive
        kept = above | (tied & (tied.cumsum(-1) <= keep.sum() - above.sum()))
        values = (logits / temperature).masked_fill(~kept, -torch.inf)
        return (values + self._noise(len(logits), key).to(values.device)).argmax(-1, keepdim=True)

    @staticmethod
    def _noise(count, key):
        """Standard Gumbel noise of the tokens [0, count), from a position's key: two int32 numbers."""
        bits = torch.arange(count, dtype=torch.int32) + key[0]
        rounds = ((17, 0xED5AD4BB - 2**32), (11, 0xAC4C1B51 - 2**32), (15, 0x31848BAB))
        for number, (shift, multiplier) in enumerate(rounds):
            bits ^= (bits >> shift) & ((1 << 32 - shift) - 1)
            bits *= multiplier
            if number == 0:
                bits ^= key[1]
        bits ^= (bits >> 14) & ((1 << 18) - 1)
        u = ((bits & 0x7FFFFFFF).float() + 0.5).mul(2.0**-31).clamp(max=1 - 2.0**-24)
        return -torch.log(-torch.log1p(-u))

    def _unconditional(self, input_ids):
        """Logits [vocabulary] behind the current image block alone, which its own cache follows."""
        response = input_ids[self.prompt_tokens :].tolist()
        start = max(place for place, token in enumerate(response) if token not in self.inside)
        first, fed = self.block
        if self.cache is None or first != start:
            fed, self.cache = start, None
        outputs = self.model(
            input_ids=input_ids[None, self.prompt_tokens + fed :], past_key_values=self.cache, use_cache=True
        )
        self.block, self.cache = (start, len(response)), outputs.past_key_values
        return outputs.logits[0, -1]


def refuse_wrong(settings):
    """ValueError for a value that nothing could be sampled with."""
    for name, value in settings.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        wanted, fits = {
            "temperature": ("above 0", is_number and value > 0),
            "text_temperature": ("above 0, or None", value is None or (is_number and value > 0)),
            "top_p": ("above 0, at most 1", is_number and 0 < value <= 1),
            "cfg_scale": ("0 or more", is_number and value >= 0),
            "colour": (f"one of {', '.join(COLOUR_FIXES)}", value in COLOUR_FIXES),
        }.get(name, ("whole, 0: off", isinstance(value, int) and value >= 0))
        if not fits:
            raise ValueError(f"{name}={value!r}: give {'' if name == 'colour' else 'a number '}{wanted}")


def degradation_phrases():
    """All texts of the degradation field."""
    levels, resizes = ("light", "medium", "heavy"), ("upsample", "downsample", "keep")
    slots = itertools.product(levels, resizes, levels, levels, resizes)
    return [f"{blur} blur, {one}, {noise} noise, {jpeg} compression, {two}" for blur, one, noise, jpeg, two in slots]
