import numpy as np
import torch

from realsr_hpc.records import Candidate, DegradationLabel, ParsedTrace, SceneText

torch.set_num_threads(1)
LABEL = DegradationLabel("light", "downsample", "medium", "light", "upsample")
SCENE = SceneText("lions, rock", "two lions on a rock.", "two lions rest on a rock under clouds.", ("lion", "rock"))


def make_trace(**changes) -> ParsedTrace:
    """A well-formed trace that says exactly what LABEL and SCENE say."""
    grids = tuple(np.zeros((side, side), dtype=np.int64) for side in (4, 8, 16))
    fields = {"degradation": LABEL.phrase, "texts": SCENE.captions, "images": grids, "faults": ()}
    return ParsedTrace(**(fields | changes))


def make_candidate(image: np.ndarray | None, trace: ParsedTrace | None = None, **changes) -> Candidate:
    lq = np.zeros((32, 32, 3), np.uint8) if image is None else downscale(image, 4)
    fields = {"trace": trace or make_trace(), "image": image, "key": "x", "lq": lq, "label": LABEL, "scene": SCENE}
    return Candidate(**(fields | changes))


def downscale(image: np.ndarray, factor: int) -> np.ndarray:
    """Area average, rounded: independent of the room's own."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)
