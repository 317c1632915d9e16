"""Renders entries as one HTML file."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from realsr_hpc.data.decoding import BrokenImage, shown_rgb
from realsr_hpc.files import printable, write_atomically
from realsr_hpc.gallery.entries import Entry, Result
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES

log = logging.getLogger(__name__)
TEMPLATE = "page.html.j2"
MAX_SIDE_PX = 1024
"""Longest side of an embedded image; larger images are reduced to keep the file small."""
_QUALITY = 88


def write_page(entries: Sequence[Entry], path: Path, title: str) -> None:
    """Write the page atomically. ValueError if there are no entries."""
    if not entries:
        raise ValueError("nothing to show: no group, evaluation or restored image was found")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, printable(render(entries, title)))


def render(entries: Sequence[Entry], title: str) -> str:
    """The page's HTML; all texts are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [_entry(number, entry) for number, entry in enumerate(entries)]
    return environment.get_template(TEMPLATE).render(
        title=title,
        entries=shown,
        sources=sorted({entry.source for entry in entries}),
        kinds=sorted({entry.kind for entry in entries}),
        steps=sorted({entry.step for entry in entries}),
        slots=_slot_choices(entries),
    )


def data_uri(path: Path) -> str:
    """An image file as the data URI of a WebP, at most `MAX_SIDE_PX` per side. BrokenImage if it cannot be read."""
    image = Image.fromarray(shown_rgb(path))
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data_uris(paths: Mapping[str, Path]) -> dict[str, str]:
    """Data URIs by name; a file that cannot be read is left out and logged."""
    shown: dict[str, str] = {}
    for name, path in paths.items():
        try:
            shown[name] = data_uri(path)
        except BrokenImage as error:
            log.warning("%s is not shown: %s", printable(path), error)
    return shown


def _entry(number: int, entry: Entry) -> dict[str, object]:
    numbers = list(dict.fromkeys(name for result in entry.results for name in result.numbers))
    totals = [result.total for result in entry.results if result.total is not None]
    return {
        "id": f"entry-{number}",
        "source": entry.source,
        "kind": entry.kind,
        "step": entry.step,
        "key": entry.key,
        "degradation": entry.degradation,
        "slots": _slots(entry.degradation),
        "captions": dict(zip(IMAGE_NAMES, entry.captions, strict=False)),
        "images": _data_uris(entry.images),
        "numbers": numbers,
        "spread": max(totals) - min(totals) if totals else 0.0,
        "best": max(totals) if totals else None,
        "has_advantage": any(result.advantage is not None for result in entry.results),
        "results": [_result(result, entry) for result in entry.results],
    }


def _result(result: Result, entry: Entry) -> dict[str, object]:
    images = _data_uris(result.images)
    totals = [item.total for item in entry.results if item.total is not None]
    return {
        "name": result.name,
        "images": images,
        "shown": [name for name in (*IMAGE_NAMES, "steps") if name in images],
        "said": _compared(result.degradation, entry.degradation),
        "texts": [(name, text) for name, text in zip(IMAGE_NAMES, result.texts, strict=False)],
        "faults": result.faults,
        "numbers": result.numbers,
        "total": result.total,
        "advantage": result.advantage,
        "is_best": len(totals) > 1 and result.total == max(totals),
    }


def _slots(phrase: str | None) -> list[str]:
    return [part.strip() for part in phrase.split(",")] if phrase else []


def _compared(said: str | None, true: str | None) -> list[tuple[str, bool | None]]:
    """Each degradation slot that the model named, and whether it is right (None if unknown)."""
    truth = _slots(true)
    return [(slot, slot == truth[place] if place < len(truth) else None) for place, slot in enumerate(_slots(said))]


def _slot_choices(entries: Sequence[Entry]) -> list[str]:
    """True words to filter by: those of blur, noise and compression; resize words occur twice in a phrase."""
    found = {slot for entry in entries for slot in _slots(entry.degradation) if " " in slot}
    order = {"light": 0, "medium": 1, "heavy": 2}
    return sorted(found, key=lambda slot: (slot.partition(" ")[2], order.get(slot.partition(" ")[0], 3)))
