"""CLIP-Adapter: a bottleneck blended with the feature, in front of the text's classifier (arXiv 2110.04544).

The visual adapter alone, as in the paper's main results; `adapter_scale` is its residual ratio alpha (0.2 there) and
`rank` its width (a quarter of D there). Different here: the loss is adjusted by tau, 0 in the paper. Not reproduced
over a cache: fresh crops.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ulfine_fast.core.heads import Tensors, cosine_logits, padded_normals
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.ops.prototypes import normalize


@register("clip_adapter", options=LabeledOptions, source="CLIP-Adapter, arXiv 2110.04544")
class ClipAdapter(Method):
    """Logits sigma cos(alpha A(x) + (1 - alpha) x, t_k), A(x) = relu(relu(x W_1) W_2), as released."""

    uses_unlabeled = False

    def start(self, trials: Trials) -> State:
        """W_1 (T, D, R) and W_2 (T, R, D) from each trial's seed, zero beyond its rank; the textual prototypes stay."""
        dim, ranks = trials.prototypes.shape[-1], trials.values["rank"]
        down = padded_normals(trials.seeds, 0, ranks, lambda rank: (dim, rank))
        up = padded_normals(trials.seeds, 1, ranks, lambda rank: (rank, dim))
        # variance 1 / (3 rows), that of PyTorch's linear layers
        parameters = {"down": down / math.sqrt(3 * dim), "up": up / torch.sqrt(3 * ranks).view(-1, 1, 1)}
        return State(parameters, {"prototypes": trials.prototypes.clone()})

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Adjusted cross-entropy of the labelled images."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        loss = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"]).mean(-1)
        return Losses.labeled_only(loss)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Text logits (T, B, K) of the blended feature."""
        # a blend, not a sum: at ratio 1 nothing of the feature is left
        ratio = trials.values["adapter_scale"].view(-1, 1, 1)
        hidden = torch.relu(features @ tensors["down"])  # (T, B, r)
        blended = ratio * torch.relu(hidden @ tensors["up"]) + (1 - ratio) * features
        return cosine_logits(normalize(blended), tensors["prototypes"], trials.values["scale"])
