"""ULFine's step by hand: what :mod:`ulfine_fast.methods.ulfine` adds to an adapter below cosine heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast.core.fused.heads import HeadRows, add_orthogonality_gradient
from ulfine_fast.core.fused.prototypes import fit_prototypes_, move_visual_
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.ops import kernels
from ulfine_fast.ops.fusion import fuse
from ulfine_fast.ops.losses import PseudoLabels, pseudo_labels
from ulfine_fast.ops.prototypes import fitting_pace, move_prior


class FusedULFine(FusedStep):
    """Both heads in one product; pseudo-labels from fused logits; prototypes pulled apart and fitted in place."""

    heads = ("linear", "prototypes")

    def labeled_adjustment(self) -> Tensor:
        """Times tau, log pi for the linear head, and for the similarity head where it is adjusted too (T, 2, K)."""
        values = self.trials.values
        tau = torch.stack([values["tau"], values["tau"] * values["adjust_similarity"]], dim=1)  # (T, 2)
        return tau.unsqueeze(2) * self.trials.log_prior.unsqueeze(1)

    def unlabeled_adjustment(self) -> Tensor:
        """tau_u log P for both heads (T, 2, K)."""
        log_prior = torch.log(self.state.memory["prior"] + 1e-8)
        return (self.trials.values["tau_u"].view(-1, 1) * log_prior).unsqueeze(1).expand(-1, 2, -1)

    def pseudo_labels(self, logits: Tensor) -> PseudoLabels:
        """From both heads' fused logits, or the linear head's alone where DLF is off."""
        values = self.trials.values
        eta = torch.where(values["dlf"] > 0, values["eta"], torch.ones_like(values["eta"]))
        config, told = self.trials.config, (values["threshold"], values["sharpen"])
        if kernels.usable(logits) and (config.align, config.prior) == ("standardize", "soft"):
            labels, mask, mean = kernels.pseudo_labels(logits[:, :, 0], logits[:, :, 1], eta, *told)
            # the running distribution asks for no more than the mean, here of one row
            return PseudoLabels(labels, mask, mean.unsqueeze(1))
        fused = fuse(logits[:, :, 0], logits[:, :, 1], eta, config.align)
        return pseudo_labels(fused, *told)

    def learning(self) -> Tensor | None:
        """Without PAF the similarity head stays where the text put it."""
        paf = self.trials.values["paf"]
        if bool((paf > 0).all()):
            return None
        learns = torch.ones(len(paf), 2 * self.classes, dtype=paf.dtype, device=paf.device)
        learns[:, self.classes :] = paf.unsqueeze(1)
        return learns

    def regularize(self) -> Tensor | None:
        """Add the gradient of lambda_o times the orthogonality; without PAF there is none."""
        values = self.trials.values
        weight = values["lambda_o"] * values["paf"]
        vectors, inverse = self.state.parameters["prototypes"], self.class_heads.inverse[:, self.classes :]
        penalty = add_orthogonality_gradient(vectors, inverse, weight, self.velocity["prototypes"], self.buffers)
        return weight * penalty

    def after_step(self, labeled: HeadRows, labels: Tensor, pseudo: PseudoLabels | None) -> None:
        """Move P, the visual prototypes and, by alpha_k = mu P_k / max P, the textual prototypes."""
        values, memory, config = self.trials.values, self.state.memory, self.trials.config
        prior, visual, seen = memory["prior"], memory["visual"], memory["seen"]
        if pseudo is not None:
            prior.copy_(move_prior(prior, pseudo.probabilities, pseudo.mask, values["rho"], config.prior))
        textual = self.state.parameters["prototypes"]
        alpha = fitting_pace(prior, values["mu"] * values["paf"], config.alpha)
        if kernels.usable(visual):
            rows = labeled.adapted, labeled.inverse.squeeze(2), labels
            kernels.move_prototypes_(visual, seen, textual, *rows, values["visual_momentum"], alpha)
            return
        rows = labeled.adapted, labeled.inverse, labels
        move_visual_(visual, seen, *rows, values["visual_momentum"], self.buffers)
        fit_prototypes_(textual, visual, alpha, seen)
