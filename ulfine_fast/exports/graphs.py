"""A run as one graph: features in, or images, and probabilities out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.run import run_logits

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.runs.run import Run


class Scorer(nn.Module):
    """What `Run.predict_proba` does.

    Args:
        run: a fitted run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        run.refuse_failed()
        self._names = list(run.tensors)
        for place, tensor in enumerate(run.tensors.values()):
            # names of tensors hold dots, which those of buffers may not
            self.register_buffer(f"t{place}", tensor.detach().clone().unsqueeze(0))
        self._tokens = run.config.reads_tokens
        self._trial = run.trial(self._tensors())
        self.temperature = float(run.metrics.get("temperature", 1.0))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"t{place}") for place, name in enumerate(self._names)}

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, D) of any length, or tokens (n, 2, W), to calibrated probabilities (n, K)."""
        rows = features.flatten(1) if self._tokens else normalize(features)
        logits = run_logits(self._trial, self._tensors(), rows.unsqueeze(0))[0]  # (n, K)
        return torch.softmax(logits / self.temperature, dim=-1)


class ImageScorer(nn.Module):
    """The encoder and what comes after it.

    Args:
        encoder: that the run was fitted with.
        scorer: the run.

    Raises:
        InputError: a run that reads tokens, which the encoder gives beside its output.
    """

    def __init__(self, encoder: Encoder, scorer: Scorer) -> None:
        super().__init__()
        if encoder.token_kinds:
            raise InputError(
                "a run with adapter adaptformer or feature pre-projection reads tokens inside the encoder and is "
                "exported without it; leave out --with-encoder"
            )
        self.visual, self.scorer = encoder.model.visual, scorer
        self.register_buffer("mean", torch.tensor(encoder.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.std).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Images uint8 (n, H, W, 3) of the model's size to calibrated probabilities (n, K)."""
        pixels = pictures.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        features = self.visual((pixels - self.get_buffer("mean")) / self.get_buffer("std"))
        # some trunks give their tokens beside the feature
        return self.scorer(features[0] if isinstance(features, tuple) else features)
