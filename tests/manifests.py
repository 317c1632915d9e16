"""Checks every photograph of a manifest against its entry."""

from collections import Counter
from dataclasses import dataclass

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import Manifest, ManifestEntry, caption_fault
from realsr_hpc.data.storage import photograph_sha256


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`: a manifest of the good entries, and the fault of every other one."""

    good: Manifest
    faults: dict[str, str]
    """By key: `missing`, `checksum`, or the decoder's reason."""

    @property
    def counts(self) -> dict[str, int]:
        """Photographs by kind of fault."""
        return dict(Counter(fault.split(":")[0] for fault in self.faults.values()))


def verify(manifest: Manifest) -> VerifyReport:
    """Read every photograph: existence, checksum, decoding."""
    good: list[ManifestEntry] = []
    faults: dict[str, str] = {}
    for entry in manifest.entries:
        fault = entry_fault(manifest, entry)
        if fault is None:
            good.append(entry)
        else:
            faults[entry.key] = fault
    return VerifyReport(Manifest(manifest.root, tuple(good)), faults)


def entry_fault(manifest: Manifest, entry: ManifestEntry) -> str | None:
    """Why the entry cannot be used, or None."""
    if fault := caption_fault(entry.scene.captions if entry.scene else ()):
        return fault
    path = manifest.path(entry)
    try:
        digest = photograph_sha256(path)
    except FileNotFoundError:
        return "missing"
    if entry.sha256 and digest != entry.sha256:
        return "checksum"
    try:
        height, width, _ = decode_image(path).shape
        if entry.lq_path is not None:
            decode_image(manifest.lq_path(entry))
    except BrokenImage as error:
        return str(error)
    if (width, height) != (entry.width, entry.height):
        return f"size: {width}x{height} px, the manifest says {entry.width}x{entry.height}"
    return None
