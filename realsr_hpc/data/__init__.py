"""Photographs in, degraded batches out: manifest, decoding, degradation, loader."""
