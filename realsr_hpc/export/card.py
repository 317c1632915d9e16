"""The model card of an export (README.md): what it is, its origin, results and licence."""

from __future__ import annotations

from collections.abc import Mapping

import realsr_hpc
from realsr_hpc.config.schema import RunConfig

_CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: image-to-image
tags: [super-resolution, chameleon, grpo, vlcot]
---

# {name}

A real-world super-resolution model (x{upscale}) that names the degradation, describes the content three times and
paints the image at {sizes} px, trained by realsr_hpc {version} (task {task}{step}).

## Use

```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # modeling_realsr.py
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)     # processing_realsr.py
restored, trace = processor.restore(model, Image.open("lq.png"), details=True)
restored.save("sr.png")
print(trace["degradation"], trace["final_understand"])
```

`processor.prompt`, `model.generate`, `processor.parse` and `model.load_decoder` are its steps. It samples as the run's
recipe restores; `seed=`, `temperature=`, `text_temperature=`, `image_top_k=`, `text_top_k=`, `top_p=` and `cfg_scale=`
change that.

`transformers.ChameleonForConditionalGeneration` loads the same weights, but masks every image token: it writes text and
never generates an image. The class in modeling_realsr.py removes that mask.

## Files

- `model*.safetensors`: policy, and the image encoder under `model.vqmodel.*`
- `vq_decoder.safetensors`: image decoder, for which transformers has no module
- `tokenizer.json`: text pieces and all special tokens; `realsr.json`: shape of prompt and trace
- `recipe.yaml`: the whole recipe of the run

## Results

{results}

## Licence

{terms}
"""


def model_card(config: RunConfig, *, step: int | None, metrics: Mapping[str, float], licence: str | None) -> str:
    """The text of the card.

    licence: None means Apache-2.0 for weights trained from a random start, else `other` (that of the start weights).
    """
    start = config.model.weights
    terms = "Weights trained from a random start with realsr_hpc; see `license` above."
    if start is not None:
        terms = (
            f"The run started from `{start}`. The licence of those weights also applies to these; "
            "read it before distributing them."
        )
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
    return _CARD.format(
        licence=licence or ("apache-2.0" if start is None else "other"),
        name=config.name,
        upscale=config.vlcot.upscale,
        sizes=", ".join(str(size) for size in config.vlcot.image_sizes_px),
        version=realsr_hpc.__version__,
        task=config.task,
        step="" if step is None else f", step {step}",
        results="\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "None recorded with this export.",
        terms=terms,
    )
