"""A run as one graph: features in, or images, and probabilities out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.heads import Tensors
from ulfine_fast.runs.run import Head

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.runs.run import Run


class Scorer(nn.Module):
    """`Run.predict_proba` as a module.

    Args:
        run: a fitted run.
        with_scores: whether it returns `Run.scores` too.
    """

    def __init__(self, run: Run, *, with_scores: bool = False) -> None:
        super().__init__()
        self.with_scores = with_scores
        run.refuse_failed()
        self._names = list(run.tensors)
        for number, tensor in enumerate(run.tensors.values()):
            # names of tensors hold dots, which those of buffers may not
            self.register_buffer(f"t{number}", tensor.detach().clone().unsqueeze(0))
        self._head = Head.of(run.config, self._tensors())
        self.temperature = float(run.metrics.get("temperature", 1.0))

    def _tensors(self) -> Tensors:
        return {name: self.get_buffer(f"t{number}") for number, name in enumerate(self._names)}

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features (n, D) of any length, or tokens (n, S, W), to calibrated probabilities (n, K), and scores (n,)."""
        # an exporter sees the buffers where they are looked up
        head = replace(self._head, tensors=self._tensors())
        rows = head.rows(features)
        probabilities = torch.softmax(head.logits(rows) / self.temperature, dim=-1)
        return (probabilities, head.scores(rows)) if self.with_scores else probabilities


class ImageScorer(nn.Module):
    """The encoder, then the run.

    Args:
        encoder: the encoder that the run was fitted with.
        scorer: the run.

    Raises:
        InputError: a run that reads tokens, which an encoder in a graph does not output.
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

    # the argument is named as the input in config.json
    def forward(self, pictures: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images uint8 (n, H, W, 3) of the model's size to what the scorer returns."""
        pixels = pictures.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        features = self.visual((pixels - self.get_buffer("mean")) / self.get_buffer("std"))
        # some trunks return their tokens beside the feature
        return self.scorer(features[0] if isinstance(features, tuple) else features)
