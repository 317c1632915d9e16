"""Finds photographs that look alike, by a 64-bit difference hash."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_DUPLICATE_BITS = 3
"""Two photographs look alike if their hashes differ in at most so many bits."""


def difference_hash(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """Difference hash (dHash): for each of 8 x 8 grey cells one bit, whether it is darker than its right neighbour."""
    cells = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def near_duplicates(hashes: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of indices whose hashes differ in at most 3 bits, directly or through others of the group.

    Two such hashes agree in at least one of their four 16-bit parts, so only hashes that share a part are compared.
    Equal hashes are grouped first, so that a thousand white pages do not cost a million comparisons.
    """
    places: dict[int, list[int]] = defaultdict(list)
    for place, value in enumerate(hashes):
        places[value].append(place)
    values = list(places)
    if not values:
        return []
    alike: list[tuple[int, int]] = []
    for shift in (0, 16, 32, 48):
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, value in enumerate(values):
            buckets[value >> shift & 0xFFFF].append(i)
        for members in buckets.values():
            for i, j in combinations(members, 2):
                if (values[i] ^ values[j]).bit_count() <= _DUPLICATE_BITS:
                    alike.append((i, j))
    rows, columns = np.array(alike, dtype=np.intp).reshape(-1, 2).T
    graph = coo_array((np.ones(len(alike), dtype=bool), (rows, columns)), shape=(len(values), len(values)))
    groups: dict[int, list[int]] = defaultdict(list)
    for value, group in zip(values, connected_components(graph, directed=False)[1].tolist(), strict=True):
        groups[group] += places[value]
    return [tuple(sorted(group)) for group in groups.values() if len(group) > 1]
