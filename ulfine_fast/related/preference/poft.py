"""Preference-oriented fine-tuning, PoFT (arXiv 2412.12865), over classes in place of answers.

There a language model is to rate its answer higher than other, aligned models do. Here the references are the zero-shot
classifiers of the cache, one for each prompt, or what the head starts from where it has no texts. Ours: p may be
adjusted for class frequencies. Lost: references that are stronger than what is trained.
"""

from __future__ import annotations

from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.ops.losses import adjusted_cross_entropy
from ulfine_fast.related.preference.losses import mean_log_likelihood, preferred


class PoFT(LinearProbe):
    """The head of `linear_probe`, by the paper's loss for answers of length 1.

    That is -log sigmoid(log p(y|x) - mean_j log p_j(y|x)), with references j.
    """

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Mean over the labelled images, by `poft_form`."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        rows = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"])  # (T, B)
        loss = preferred(rows, reference(trials, batch.labeled, batch.labels), trials.config.poft_form).mean(-1)
        return Losses(loss, loss.new_zeros(loss.shape), loss.new_zeros(loss.shape))

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """None: autograd's steps."""
        return None


def reference(trials: Trials, features: Tensor, labels: Tensor) -> Tensor:
    """Mean log-likelihood of labels (T, B) by the trials' references, for unit features (T, B, D)."""
    scale = trials.values["reference_scale"]
    if trials.texts is None:
        heads, scale = trials.prototypes.unsqueeze(0), scale * trials.values["scale"]
    else:
        heads = trials.texts
    return mean_log_likelihood(heads.unbind(0), scale, features, labels)
