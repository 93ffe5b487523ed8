"""ULFine (arXiv 2505.05062), reconstructed: prototype adaptive fitting (PAF) and dual logit fusion (DLF).

docs/method.md says of each choice whether it is published or ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.fused.heads import HeadRows, add_orthogonality_gradient
from ulfine_fast.core.fused.prototypes import fit_prototypes_, move_visual_
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import (
    LabeledOptions,
    Method,
    PseudoLabelOptions,
    RunningAdjustmentOptions,
    RunningOptions,
)
from ulfine_fast.methods.registry import register
from ulfine_fast.ops import kernels, native
from ulfine_fast.ops.fusion import fuse
from ulfine_fast.ops.losses import PseudoLabels, adjusted_cross_entropy, masked_mean, pseudo_labels
from ulfine_fast.ops.prototypes import (
    class_means,
    fit_prototypes,
    fitting_pace,
    move_prior,
    move_visual,
    orthogonality,
)
from ulfine_fast.ops.transport import sinkhorn


@dataclass(frozen=True)
class ULFineOptions(RunningAdjustmentOptions, PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`ULFine`."""

    threshold: float = option(
        0.7, "smallest probability of a pseudo-label that trains", low=0.0, high=1.0, search={"low": 0.5, "high": 0.98}
    )
    paf: bool = option(True, "fit the textual prototypes to the visual ones")
    mu: float = option(
        0.01,
        "largest step of a prototype, in alpha_k = mu P_k / max P",
        low=0.0,
        high=1.0,
        search={"low": 0.001, "high": 0.1, "log": True},
    )
    alpha: str = option(
        "pseudo-label", "alpha_k from P, or the constant mu", choices=("pseudo-label", "constant"), structural=True
    )
    prior: str = option(
        "soft",
        "P from all probabilities, or from counts above the threshold",
        choices=("soft", "hard"),
        structural=True,
    )
    visual_momentum: float = option(0.95, "momentum m of the visual prototypes", low=0.0, high=0.9999)
    lambda_o: float = option(
        0.1, "weight of the prototypes' orthogonality", low=0.0, search={"low": 0.01, "high": 1.0, "log": True}
    )
    orthogonality: str = option(
        "prototypes",
        "what the orthogonality moves: learnable prototypes, or features through the visual prototypes",
        choices=("prototypes", "features"),
        structural=True,
    )
    adjust_similarity: bool = option(True, "logit adjustment on the similarity head too")
    dlf: bool = option(True, "pseudo-labels from fused logits; otherwise from the linear head")
    eta: float = option(
        0.5, "weight of the linear head in the fused logits", low=0.0, high=1.0, search={"low": 0.2, "high": 0.8}
    )
    align: str = option(
        "standardize",
        "how the scales of both logits are aligned before fusion",
        choices=("standardize", "max-ratio", "none"),
        structural=True,
    )
    predict_from: str = option(
        "fused", "logits of the final prediction", choices=("fused", "linear", "similarity"), structural=True
    )
    pseudo_labels: str = option(
        "argmax",
        "pseudo-labels of a mini-batch, as they are or transported onto the running distribution P",
        choices=("argmax", "sinkhorn"),
        structural=True,
    )


@register("ulfine", options=ULFineOptions, source="ULFine, arXiv 2505.05062")
class ULFine(Method):
    """Adapter, linear head, fitted textual prototypes; pseudo-labels and predictions from both heads' fused logits."""

    takes_tokens = True

    def start(self, trials: Trials) -> State:
        """Both heads (T, K, D) at the textual prototypes; P (T, K) uniform; visual prototypes (T, K, D) unseen."""
        prototypes = trials.prototypes
        adapter, frozen = trials.adapter()
        parameters = {"linear": prototypes.clone(), **adapter}
        memory = {
            **frozen,
            "visual": torch.zeros_like(prototypes),
            "seen": torch.zeros(prototypes.shape[:2], dtype=torch.bool, device=prototypes.device),
            "prior": torch.full_like(trials.log_prior, 1.0 / prototypes.shape[1]),
        }
        learned = trials.config.orthogonality == "prototypes"
        (parameters if learned else memory)["prototypes"] = prototypes.clone()
        return State(parameters, memory)

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Adjusted cross-entropies of both heads, labelled and pseudo-labelled; lambda_o times the orthogonality."""
        values = trials.values
        adapted = apply_adapter(state.tensors, batch.labeled, values["adapter_scale"])  # (T, B, D)
        linear, similarity = self.both_logits(trials, state.tensors, adapted)
        labeled = _mean_loss(linear, batch.labels, trials.log_prior, values["tau"])
        tau_similarity = values["tau"] * values["adjust_similarity"]
        labeled = labeled + _mean_loss(similarity, batch.labels, trials.log_prior, tau_similarity)
        penalty = self.orthogonality_penalty(trials, state, adapted, batch.labels)
        regularizer = values["lambda_o"] * values["paf"] * penalty
        if batch.weak is None or batch.strong is None:
            return Losses(labeled, trials.zeros(), regularizer, adapted=adapted.detach())
        with torch.no_grad():
            weak = self.pseudo_logits(trials, state.tensors, batch.weak)
        pseudo = pseudo_labels(weak, values["threshold"], values["sharpen"])
        if trials.config.pseudo_labels == "sinkhorn":
            pseudo = _transported(pseudo, weak / values["sharpen"].view(-1, 1, 1), state.memory["prior"], values)
        unlabeled = values["lambda_u"] * self.unlabeled_loss(trials, state, batch.strong, pseudo)
        return Losses(labeled, unlabeled, regularizer, pseudo, adapted.detach())

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move P, the visual prototypes and, by alpha_k = mu P_k / max P, the textual prototypes."""
        values, memory, config = trials.values, state.memory, trials.config

        # the running pseudo-label distribution P
        if losses.pseudo is not None:
            pseudo = losses.pseudo
            prior = move_prior(memory["prior"], pseudo.probabilities, pseudo.mask, values["rho"], config.prior)
            memory["prior"].copy_(prior)

        # the visual prototypes
        assert losses.adapted is not None
        means, counts = class_means(losses.adapted, batch.labels, memory["prior"].shape[-1])
        visual = move_visual(memory["visual"], means, counts, memory["seen"], values["visual_momentum"])
        memory["visual"].copy_(visual)
        memory["seen"].logical_or_(counts > 0)

        # the textual prototypes
        alpha = fitting_pace(memory["prior"], values["mu"] * values["paf"], config.alpha)
        prototypes = state.tensors["prototypes"]
        prototypes.copy_(fit_prototypes(prototypes, memory["visual"], alpha, memory["seen"]))

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """Only where the prototypes learn and pseudo-labels are not transported; other variants need autograd."""
        covered = "prototypes" in state.parameters and trials.config.pseudo_labels == "argmax"
        return FusedULFine if type(self) is ULFine and covered else None

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Fused logits (T, B, K); the linear head's alone (at the similarity head's scale) where DLF is off."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])  # (T, B, D)
        linear, similarity = self.both_logits(trials, tensors, adapted)
        return fuse(linear, similarity, fusion_weight(trials.values), trials.config.align)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the fused, the linear or the similarity head, as `predict_from` says."""
        adapted = apply_adapter(tensors, features, trials.values["adapter_scale"])  # (T, B, D)
        linear, similarity = self.both_logits(trials, tensors, adapted)
        if trials.config.predict_from == "linear":
            return linear
        if trials.config.predict_from == "similarity":
            return similarity
        return fuse(linear, similarity, fusion_weight(trials.values), trials.config.align)

    def both_logits(self, trials: Trials, tensors: Tensors, adapted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the linear and the similarity head, each (T, B, K), for adapted rows (T, B, D)."""
        scale, fitted = trials.values["scale"], trials.values["paf"].view(-1, 1, 1)
        fixed = tensors["prototypes"].detach()
        # without PAF no gradient reaches the prototypes: they stay those of the text
        prototypes = fixed + fitted * (tensors["prototypes"] - fixed)
        both = cosine_logits(adapted, torch.cat([tensors["linear"], prototypes], dim=1), scale)
        linear, similarity = both.chunk(2, -1)
        return linear, similarity

    def unlabeled_loss(self, trials: Trials, state: State, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """Both heads' cross-entropy on the strong view (T,), adjusted by the running distribution P."""
        values = trials.values
        adapted = apply_adapter(state.tensors, strong, values["adapter_scale"])
        log_prior = torch.log(state.memory["prior"] + 1e-8)
        losses = [
            masked_mean(adjusted_cross_entropy(logits, pseudo.labels, log_prior, values["tau_u"]), pseudo.mask)
            for logits in self.both_logits(trials, state.tensors, adapted)
        ]
        return losses[0] + losses[1]

    def orthogonality_penalty(self, trials: Trials, state: State, adapted: Tensor, labels: Tensor) -> Tensor:
        """The penalty (T,); `orthogonality` says through what its gradient goes."""
        prototypes = state.tensors["prototypes"]
        if trials.config.orthogonality == "prototypes":
            return orthogonality(prototypes)
        memory, values = state.memory, trials.values
        means, counts = class_means(adapted, labels, prototypes.shape[1])
        visual = move_visual(memory["visual"], means, counts, memory["seen"], values["visual_momentum"])
        alpha = fitting_pace(memory["prior"], values["mu"], trials.config.alpha)
        return orthogonality(fit_prototypes(prototypes, visual, alpha, memory["seen"] | (counts > 0)))


def fusion_weight(values: Tensors) -> Tensor:
    """Weight eta of the linear head in the fused logits (T,); 1 where DLF is off."""
    return torch.where(values["dlf"] > 0, values["eta"], torch.ones_like(values["eta"]))


def _transported(pseudo: PseudoLabels, logits: Tensor, prior: Tensor, values: Tensors) -> PseudoLabels:
    """Pseudo-labels from the mini-batch as one bag with the class proportions P (T, K).

    The probabilities, which move P, stay the model's: those transported have the mean P already.
    """
    present = torch.ones_like(pseudo.labels, dtype=torch.bool).unsqueeze(1)
    confidence, labels = sinkhorn(logits.unsqueeze(1), prior.unsqueeze(1), present).squeeze(1).max(-1)
    return pseudo._replace(labels=labels, mask=(confidence >= values["threshold"].unsqueeze(-1)).to(logits.dtype))


def _mean_loss(logits: Tensor, labels: Tensor, log_prior: Tensor, tau: Tensor) -> Tensor:
    return adjusted_cross_entropy(logits, labels, log_prior, tau).mean(-1)


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
        values, config = self.trials.values, self.trials.config
        eta = fusion_weight(values)
        in_one = self.compiled or kernels.usable(logits)
        if in_one and (config.align, config.prior) == ("standardize", "soft"):
            passes = native if self.compiled else kernels
            labels, mask, mean = passes.pseudo_labels(
                logits[:, :, 0], logits[:, :, 1], eta, values["threshold"], values["sharpen"]
            )
            # the running distribution needs the mean alone, here as that of one row
            return PseudoLabels(labels, mask, mean.unsqueeze(1))
        fused = fuse(logits[:, :, 0], logits[:, :, 1], eta, config.align)
        return pseudo_labels(fused, values["threshold"], values["sharpen"])

    def learning(self) -> Tensor | None:
        """All vectors; without PAF those of the similarity head get no gradient."""
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
        penalty = add_orthogonality_gradient(
            vectors, inverse, weight, self.velocity["prototypes"], self.buffers, arithmetic=self.arithmetic
        )
        return weight * penalty

    def after_step(self, labeled: HeadRows, labels: Tensor, pseudo: PseudoLabels | None) -> None:
        """Move P, the visual prototypes and, by alpha_k = mu P_k / max P, the textual prototypes."""
        values, memory, config = self.trials.values, self.state.memory, self.trials.config
        prior = memory["prior"]
        if pseudo is not None:
            prior.copy_(move_prior(prior, pseudo.probabilities, pseudo.mask, values["rho"], config.prior))
        alpha = fitting_pace(prior, values["mu"] * values["paf"], config.alpha)
        textual = self.state.parameters["prototypes"]
        if self.compiled or kernels.usable(memory["visual"]):
            passes = native if self.compiled else kernels
            passes.move_prototypes_(
                visual=memory["visual"],
                seen=memory["seen"],
                textual=textual,
                rows=labeled.adapted,
                inverse=labeled.inverse.squeeze(2),
                labels=labels,
                momentum=values["visual_momentum"],
                alpha=alpha,
            )
            return
        move_visual_(
            visual=memory["visual"],
            seen=memory["seen"],
            rows=labeled.adapted,
            inverse=labeled.inverse,
            labels=labels,
            momentum=values["visual_momentum"],
            buffers=self.buffers,
        )
        fit_prototypes_(textual, memory["visual"], alpha, memory["seen"])
