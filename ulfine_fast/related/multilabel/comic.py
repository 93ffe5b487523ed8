"""COMIC (arXiv 2304.10539): correction of unknown labels, modification of the loss, balance of three classifiers.

L = L_modified(balanced) + lambda_c L_corrected + L_modified(head) + L_modified(tail) + lambda_b L_balance. The paper
trains three networks; here three classifiers share the stored features. Where paper and released code differ the
paper's three parts are kept, without the code's attention over co-occurring labels and its three samplers; the product
of probabilities in the balance loss is one of sigmoids (the code's softmax is no probability of a label).
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
    """What COMIC remembers from step to step.

    Attributes:
        probability: running mean probability of each class (T, K).
        restored: running mean of restored labels an image (T, K).
        feature: running sum of mean features (T, D).
    """

    probability: Tensor
    restored: Tensor
    feature: Tensor

    @classmethod
    def empty(cls, trials: int, classes: int, dim: int, device: torch.device) -> Memory:
        """All zero."""
        zero = torch.zeros(trials, classes, device=device)
        return cls(zero, zero.clone(), torch.zeros(trials, dim, device=device))

    @torch.no_grad()
    def see_features(self, features: Tensor, momentum: Tensor) -> None:
        """Move e to mu e + the batch's mean feature; features (T, B, D), momentum (T,)."""
        self.feature = momentum.view(-1, 1) * self.feature + features.mean(1)


def plain_focus(values: Values, classes: int) -> Focus:
    """The same powers for all classes: asymmetric loss."""
    one = torch.ones_like(values["clip"]).view(-1, 1, 1).expand(-1, 1, classes)
    positive, negative, clip = (values[name].view(-1, 1, 1) for name in ("gamma_positive", "gamma_negative", "clip"))
    return Focus(positive * one, negative * one, clip, one)


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
    more, less = (values[name].view(-1, 1, 1) for name in ("tail_positive", "tail_negative"))
    return Focus(plain.positive + more * rare, plain.negative + less * rare, plain.clip, rare)


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
    """Correction: the modified loss on labels with the restored ones among them (RLC), and its memory moved on.

    Present labels lose a margin of their logit. The sum of the batch is divided by its present labels. Class weights
    follow the given labels and those that are being restored.

    Args:
        logits: (T, B, K).
        labels: 1, 0 or -1 (T, B, K).
        targets: what they are taken for.
        memory: of all trials; moved on.
        counts: present labels of each class (T, K).
        size: training images (T,).
        values: settings (T,).

    Returns:
        (T,), without lambda_c.
    """
    given = labels > 0
    found = restorable(logits.sigmoid(), labels, memory.probability, values["threshold"])
    _remember(memory, logits, found, values["mean_momentum"])
    focus = modified_focus(values, counts + memory.restored * size.view(-1, 1), halved=True)
    moved = torch.where(given, logits - values["margin"].view(-1, 1, 1), logits)
    present = (given | found).float()
    loss = focal(F.logsigmoid(moved), Targets(present, targets.absent * ~found), focus)
    return loss * labels.shape[1] / present.sum((1, 2)).clamp(min=1.0)


@torch.no_grad()
def _remember(memory: Memory, logits: Tensor, found: Tensor, momentum: Tensor) -> None:
    """Move the running means of probabilities and restored labels on."""
    keep = momentum.view(-1, 1)
    memory.probability = keep * memory.probability + (1 - keep) * logits.sigmoid().mean(1)
    memory.restored = keep * memory.restored + (1 - keep) * found.float().mean(1)


def shifted(logits: Tensor, weights: Tensor, features: Tensor, direction: Tensor, values: Values) -> Tensor:
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

    The balanced classifier's probability times that of head or tail, whose gradient is cut, is judged as one
    probability; the one with the larger loss weighs more, by the ratio of losses to the power alpha.

    Args:
        balanced: logits (T, B, K).
        others: those of :func:`shifted` (T, 2, B, K).
        targets: labels.
        focus: of the modified loss.
        values: settings (T,).

    Returns:
        (T,), lambda_b in it.
    """
    own, log_balanced = F.logsigmoid(others), F.logsigmoid(balanced)
    head, tail = (focal(own[:, i], targets, focus) for i in range(2))  # (T,) each
    by_head, by_tail = (focal(own[:, i].detach() + log_balanced, targets, focus) for i in range(2))
    ratio = head.detach().clamp(min=1e-12).log() - tail.detach().clamp(min=1e-12).log()
    kappa = torch.sigmoid(values["balance_power"] * ratio)  # h^a / (h^a + t^a)
    return head + tail + values["balance_weight"] * (kappa * by_head + (1 - kappa) * by_tail)
