"""Two-stage learning from label proportions, PLOT (arXiv 2105.10635): bags of images, and each bag's class shares.

Stage one fits a bag's mean prediction to its shares. Stage two gives every image a label, by entropic transport of
the bag's predictions onto its shares, and learns from these with symmetric cross-entropy and mixup. The paper's
equations and values were not at hand: transport at epsilon 1, the weights and Beta(8, 8) are ours, and so is the start
at the class texts, without which nothing says which class is which. Mixup is of features, and there is no adapter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import cosine_logits
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.ops.philox import Purpose, words
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.label_proportions.losses import beta_draws, proportion_loss, sinkhorn, symmetric_cross_entropy


class Proportions(LinearProbe):
    """The head of `linear_probe`, by class shares of bags; no image's own label is read."""

    uses_pool = True
    uses_bags = True

    def start(self, trials: Trials) -> State:
        """The linear head (T, K, D) at the textual prototypes, and the step (T,)."""
        state = super().start(trials)
        state.scratch["step"] = torch.zeros_like(trials.seeds)
        return state

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Label the images of all bags anew (T, G, m), in trials that are in stage two."""
        assert pool.bags is not None
        late = step >= trials.values["stage_one"] * trials.config.steps  # (T,)
        state.scratch["late"] = late
        labels = torch.zeros_like(pool.bags.index)
        if bool(late.any()):
            rows = pool.features.rows(pool.bags.index.flatten(1))  # (T, G m, D)
            logits = self.logits(trials, state.tensors, rows).unflatten(1, labels.shape[1:])
            if trials.config.bag_labels == "sinkhorn":
                logits = sinkhorn(logits, pool.bags.shares, pool.bags.present)
            labels = logits.argmax(-1)
        state.scratch["labels"] = labels

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """The loss of the stage that a trial is in (T,)."""
        late = state.scratch["late"]
        loss = torch.where(late, self._by_labels(trials, state, batch), self._by_shares(trials, state, batch))
        return Losses(loss, torch.zeros_like(loss), torch.zeros_like(loss))

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step."""
        state.scratch["step"] += 1

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """None: autograd's steps."""
        return None

    def _by_shares(self, trials: Trials, state: State, batch: Batch) -> Tensor:
        """Mean loss of the batch's bags (T,)."""
        assert batch.bags is not None
        present = batch.bags.present
        logits = self.logits(trials, state.tensors, batch.labeled).unflatten(1, present.shape[1:])  # (T, G, m, K)
        return proportion_loss(logits, batch.bags.shares, present).mean(-1)

    def _by_labels(self, trials: Trials, state: State, batch: Batch) -> Tensor:
        """Mean symmetric cross-entropy of the batch's images (T,), each mixed with another."""
        assert batch.bags is not None
        places = batch.bags.places.unsqueeze(-1).expand(-1, -1, batch.bags.present.shape[-1])
        labels = state.scratch["labels"].gather(1, places).flatten(1)  # (T, B)
        targets = F.one_hot(labels, trials.prototypes.shape[1]).to(batch.labeled.dtype)  # (T, B, K)
        present = batch.bags.present.flatten(1)
        rows, targets = self._mixed(trials, state, batch.labeled, targets, present)
        logits = cosine_logits(rows, state.parameters["linear"], trials.values["scale"])
        losses = symmetric_cross_entropy(logits, targets, trials.values["reverse_weight"])
        return (losses * present).sum(-1) / present.sum(-1)

    def _mixed(
        self, trials: Trials, state: State, rows: Tensor, targets: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit rows (T, B, D) and targets (T, B, K), each l of its own and 1 - l of a present one's, l ~ Beta(a, a)."""
        drawn = 2 * trials.config.mixup
        if not drawn:
            return rows, targets
        step, count = state.scratch["step"][:1], rows.shape[1]
        numbers = words(trials.seeds, step, Purpose.BLEND, count * drawn)[0].view(-1, count, drawn)  # (T, B, 2 a)
        own = beta_draws(numbers[..., 1:].to(rows.dtype) / 2**32).unsqueeze(-1)
        # present rows stand first in this order, so that no partner is padding
        order = present.logical_not().long().sort(dim=-1, stable=True).indices
        partner = order.gather(1, (numbers[..., 0] * present.sum(-1, keepdim=True)) >> 32).unsqueeze(-1)
        mixed = (
            own * tensor + (1 - own) * tensor.gather(1, partner.expand(-1, -1, tensor.shape[-1]))
            for tensor in (rows, targets)
        )
        features, shares = mixed
        return normalize(features), shares
