"""Pictures that several rooms' tests measure."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """128 px crop of a photograph, sharp at the pixel."""
    picture = Image.fromarray(data.astronaut()).resize((192, 192), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture)[:128, :128])


@pytest.fixture(scope="session")
def other_photograph() -> np.ndarray:
    picture = Image.fromarray(data.coffee()).resize((192, 128), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture)[:, :128])
