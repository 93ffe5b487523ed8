"""COMIC (arXiv 2304.10539): correction of unknown labels, modification of the loss, balance of three classifiers.

L = L_modified(balanced) + lambda_c L_corrected + L_modified(head) + L_modified(tail) + lambda_b L_balance. The paper
trains three networks; here three classifiers share the stored features. Where paper and released code differ the
paper's three parts are kept, without the code's attention over co-occurring labels and its three samplers; the product
of probabilities in the balance loss is one of sigmoids (the code's softmax is not a probability of a label).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.multilabel.losses import Focus, Targets, focal, rarity

Values = dict[str, Tensor]
BALANCED, HEAD, TAIL = 0, 1, 2


@dataclass
class Memory:
    """Running means that COMIC keeps from step to step.

    Attributes:
        probability: mean probability of each class (T, K).
        restored: mean of restored labels an image (T, K).
        feature: running sum of mean features (T, D).
    """

    probability: Tensor
    restored: Tensor
    feature: Tensor

    @classmethod
    def empty(cls, trials: int, classes: int, dim: int, device: torch.device) -> Memory:
        """All zero."""
        return cls(
            probability=torch.zeros(trials, classes, device=device),
            restored=torch.zeros(trials, classes, device=device),
            feature=torch.zeros(trials, dim, device=device),
        )

    @torch.no_grad()
    def add_features(self, features: Tensor, momentum: Tensor) -> None:
        """Change e to mu e + the batch's mean feature; features (T, B, D), momentum mu (T,)."""
        self.feature = momentum.view(-1, 1) * self.feature + features.mean(1)

    @torch.no_grad()
    def add_labels(self, probabilities: Tensor, restored: Tensor, momentum: Tensor) -> None:
        """Update the means of probabilities and of restored labels, both (T, B, K); momentum (T,)."""
        kept = momentum.view(-1, 1)
        self.probability = kept * self.probability + (1 - kept) * probabilities.mean(1)
        self.restored = kept * self.restored + (1 - kept) * restored.float().mean(1)


def plain_focus(values: Values, classes: int) -> Focus:
    """The same powers for all classes: asymmetric loss."""
    ones = torch.ones_like(values["clip"]).view(-1, 1, 1).expand(-1, 1, classes)
    positive, negative, clip = (values[name].view(-1, 1, 1) for name in ("gamma_positive", "gamma_negative", "clip"))
    return Focus(positive=positive * ones, negative=negative * ones, clip=clip, weight=ones)


def modified_focus(values: Values, counts: Tensor, *, halved: bool = False) -> Focus:
    """Modification: powers and weights that grow with a class's rarity (MFM).

    Args:
        values: settings (T,).
        counts: images of each class (T, K).
        halved: whether rarity has half its power, as in the loss on corrected labels.
    """
    plain = plain_focus(values, counts.shape[1])
    power = values["rarity_power"]
    rare = rarity(counts, power / 2 if halved else power).unsqueeze(1)  # (T, 1, K)
    tail_positive, tail_negative = (values[name].view(-1, 1, 1) for name in ("tail_positive", "tail_negative"))
    return Focus(
        positive=plain.positive + tail_positive * rare,
        negative=plain.negative + tail_negative * rare,
        clip=plain.clip,
        weight=rare,
    )


@torch.no_grad()
def restorable(probabilities: Tensor, labels: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """Unknown labels whose probability exceeds max(threshold, the class's running mean): bool (T, B, K).

    Args:
        probabilities: (T, B, K).
        labels: 1, 0 or -1 (T, B, K).
        mean: running mean probability (T, K).
        threshold: (T,).
    """
    least = torch.maximum(mean, threshold.view(-1, 1)).unsqueeze(1)  # (T, 1, K)
    return (labels < 0) & (probabilities > least)


def correction_loss(
    logits: Tensor, labels: Tensor, targets: Targets, memory: Memory, counts: Tensor, size: Tensor, values: Values
) -> Tensor:
    """Correction: the modified loss on labels that include the restored ones (RLC); updates the memory.

    A margin is subtracted from the logits of present labels. The sum of the batch is divided by its present labels.
    Class weights follow the known labels and those that are being restored.

    Args:
        logits: (T, B, K).
        labels: 1, 0 or -1 (T, B, K).
        targets: which labels count as present and absent.
        memory: of all trials; updated.
        counts: present labels of each class (T, K).
        size: training images (T,).
        values: settings (T,).

    Returns:
        (T,), without lambda_c.
    """
    probabilities = logits.sigmoid()
    restored = restorable(probabilities, labels, memory.probability, values["threshold"])
    memory.add_labels(probabilities, restored, values["mean_momentum"])
    focus = modified_focus(values, counts + memory.restored * size.view(-1, 1), halved=True)
    known = labels > 0
    lowered = torch.where(known, logits - values["margin"].view(-1, 1, 1), logits)
    present = (known | restored).float()
    loss = focal(F.logsigmoid(lowered), Targets(present, targets.absent * ~restored), focus)
    return loss * labels.shape[1] / present.sum((1, 2)).clamp(min=1.0)


def head_tail_logits(logits: Tensor, weights: Tensor, features: Tensor, direction: Tensor, values: Values) -> Tensor:
    """Logits of the head classifier without the mean feature's part of the score, of the tail classifier with twice it.

    The part is rho cos(f, e) w^T e / |e|.

    Args:
        logits: of balanced, head and tail classifier (T, 3, B, K).
        weights: normalised class vectors (T, 3, K, D).
        features: unit rows (T, B, D).
        direction: e, of any length (T, D).
        values: settings (T,).

    Returns:
        Logits of head and tail (T, 2, B, K).
    """
    mean = normalize(direction).unsqueeze(1)  # (T, 1, D)
    # sums instead of matrix products, whose order of summing depends on how many trials there are
    along = (weights[:, HEAD:] * mean.unsqueeze(1)).sum(-1).unsqueeze(2)  # (T, 2, 1, K)
    part = (features * mean).sum(-1, keepdim=True).unsqueeze(1) * along  # (T, 2, B, K)
    strength = (values["scale"] * values["shift"]).view(-1, 1, 1, 1)
    sign = torch.tensor([-1.0, 1.0], device=logits.device).view(1, 2, 1, 1)
    return logits[:, HEAD:] + sign * strength * part


def balance_loss(balanced: Tensor, others: Tensor, targets: Targets, focus: Focus, values: Values) -> Tensor:
    """Balance: head and tail classifier learn, and the balanced one learns from both (HTB).

    The balanced classifier's probability times that of head or tail, detached, counts as one probability; the
    classifier with the larger loss weighs more, by the ratio of losses to the power alpha.

    Args:
        balanced: logits (T, B, K).
        others: logits of head and tail (T, 2, B, K), see :func:`head_tail_logits`.
        targets: which labels count as present and absent.
        focus: of the modified loss.
        values: settings (T,).

    Returns:
        (T,), with lambda_b.
    """
    log_others, log_balanced = F.logsigmoid(others), F.logsigmoid(balanced)
    head, tail = (focal(log_others[:, i], targets, focus) for i in range(2))  # (T,) each
    by_head, by_tail = (focal(log_others[:, i].detach() + log_balanced, targets, focus) for i in range(2))
    ratio = head.detach().clamp(min=1e-12).log() - tail.detach().clamp(min=1e-12).log()
    kappa = torch.sigmoid(values["balance_power"] * ratio)  # h^a / (h^a + t^a)
    return head + tail + values["balance_weight"] * (kappa * by_head + (1 - kappa) * by_tail)
