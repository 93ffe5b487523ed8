"""ULFine as a researcher writes it in plain PyTorch: 2-D tensors, autograd, torch.optim.SGD, one trial after another.

The same step as `method="ulfine"` with its default switches: labelled, weak and strong views, both heads, PAF, DLF.
Nothing of the engine is used but a config's numbers, so that a comparison of the two says what the engine is worth.
`torch.func.vmap` makes T trials of the same two functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig

Tensors = dict[str, Tensor]

_SWITCHES = ("adapter", "alpha", "prior", "orthogonality", "align", "paf", "dlf", "adjust_similarity", "sharpen")


class Views(NamedTuple):
    """A mini-batch of unit float32 features.

    Attributes:
        labeled: views of labelled images (B, D).
        labels: their classes (B,).
        weak: weak views of unlabelled images (U, D).
        strong: strong views of the same images (U, D).
    """

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor


@dataclass(frozen=True)
class Images:
    """Features in memory, as unit float32 rows, view after view of each image.

    Attributes:
        easy: plain and weak views of labelled images (L * V, D).
        labels: their classes (L,).
        weak: plain and weak views of unlabelled images (U * V, D).
        strong: their strong views (U * W, D).
        easy_views: V.
        strong_views: W.
    """

    easy: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    easy_views: int
    strong_views: int

    def draw(self, labeled: int, unlabeled: int) -> Views:
        """So many images of each kind and a view of each, drawn with replacement."""
        device = self.labels.device
        rows = torch.randint(len(self.labels), (labeled,), device=device)
        unlabeled_rows = torch.randint(len(self.weak) // self.easy_views, (unlabeled,), device=device)
        # an image's views are next to each other
        easy = rows * self.easy_views + torch.randint(self.easy_views, (labeled,), device=device)
        weak = unlabeled_rows * self.easy_views + torch.randint(self.easy_views, (unlabeled,), device=device)
        strong = unlabeled_rows * self.strong_views + torch.randint(self.strong_views, (unlabeled,), device=device)
        return Views(
            labeled=self.easy.index_select(0, easy),
            labels=self.labels.index_select(0, rows),
            weak=self.weak.index_select(0, weak),
            strong=self.strong.index_select(0, strong),
        )


def check_config(config: FitConfig) -> None:
    """Refuse what the plain loop does not do.

    Raises:
        InputError: another method, or a switch of ULFine that is not at its default.
    """
    default = FitConfig(method="ulfine")
    if config.method != default.method:
        raise InputError(f"the eager loop is ulfine with default switches, got method {config.method}")
    for name in _SWITCHES:
        if getattr(config, name) != getattr(default, name):
            raise InputError(f"the eager loop is ulfine with default switches, got {name} {getattr(config, name)}")


def adapted(parameters: Tensors, rows: Tensor, strength: float) -> Tensor:
    """Unit features (n, D) after the adapter."""
    standard = F.layer_norm(rows, rows.shape[-1:], parameters["scale"], parameters["shift"])
    hidden = torch.relu(standard @ parameters["down"])  # (n, r)
    return F.normalize(torch.addmm(rows, hidden, parameters["up"], alpha=strength), dim=-1)


class ForwardPass(NamedTuple):
    """What a forward pass of a mini-batch gives.

    Attributes:
        losses: labelled, unlabelled and regularising loss (3,).
        mean_probabilities: of each class on weak views (K,), without gradients.
        labeled: adapted labelled rows (B, D), without gradients.
    """

    losses: Tensor
    mean_probabilities: Tensor
    labeled: Tensor


def forward_pass(parameters: Tensors, memory: Tensors, batch: Views, config: FitConfig) -> ForwardPass:
    """The losses of a mini-batch."""
    classes = memory["prior"].shape[-1]
    labeled = len(batch.labels)
    # one product for both heads, and one for all rows that get gradients
    heads = F.normalize(parameters["heads"], dim=-1)  # (2K, D)

    # pseudo-labels
    with torch.no_grad():
        weak = adapted(parameters, batch.weak, config.adapter_scale) @ heads.T * config.scale  # (U, 2K)
        probabilities = torch.softmax(fused_logits(weak[:, :classes], weak[:, classes:], config.eta), -1)  # (U, K)
        confidence, pseudo_labels = probabilities.max(-1)
        mask = (confidence >= config.threshold).to(probabilities.dtype)

    # logits of both heads
    rows = adapted(parameters, torch.cat([batch.labeled, batch.strong]), config.adapter_scale)
    logits = (rows @ heads.T * config.scale).view(-1, 2, classes)  # (B + U, 2, K)

    # losses; both heads of a row are two rows with the same label
    labeled_logits = (logits[:labeled] + config.tau * memory["log_prior"]).flatten(0, 1)
    labeled_loss = 2 * F.cross_entropy(labeled_logits, _twice(batch.labels))
    strong_logits = (logits[labeled:] + config.tau_u * torch.log(memory["prior"] + 1e-8)).flatten(0, 1)
    strong_losses = F.cross_entropy(strong_logits, _twice(pseudo_labels), reduction="none")
    unlabeled_loss = 2 * config.lambda_u * (strong_losses * _twice(mask)).mean()
    gram = heads[classes:] @ heads[classes:].T  # (K, K)
    penalty = config.lambda_o * (gram - memory["identity"]).square().mean()
    return ForwardPass(
        losses=torch.stack([labeled_loss, unlabeled_loss, penalty]),
        mean_probabilities=probabilities.mean(0),
        labeled=rows[:labeled].detach(),
    )


def _twice(values: Tensor) -> Tensor:
    """Each value (n,) for both heads (2n,)."""
    return values.unsqueeze(1).expand(-1, 2).flatten()


@torch.no_grad()
def logits_of(parameters: Tensors, rows: Tensor, config: FitConfig) -> Tensor:
    """Fused logits (n, K) of unit features (n, D): what the trial predicts from."""
    heads = F.normalize(parameters["heads"], dim=-1)
    classes = len(heads) // 2
    both = adapted(parameters, rows, config.adapter_scale) @ heads.T * config.scale
    return fused_logits(both[:, :classes], both[:, classes:], config.eta)


def fused_logits(linear: Tensor, similarity: Tensor, eta: float) -> Tensor:
    """The linear head's logits (n, K) at the similarity head's mean and deviation, mixed with the latter's."""
    level = similarity.mean(-1, keepdim=True)
    centred = linear - linear.mean(-1, keepdim=True)
    # lengths of the centred rows, as torch.var_mean is slower on a processor
    linear_length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    similarity_length = torch.linalg.vector_norm(similarity - level, dim=-1, keepdim=True)
    aligned = torch.addcmul(level, centred, (similarity_length + 1e-6) / (linear_length + 1e-6))
    return torch.lerp(similarity, aligned, eta)


def fitted_prototypes(
    parameters: Tensors, memory: Tensors, labels: Tensor, forward: ForwardPass, config: FitConfig
) -> Tensors:
    """The prior, visual prototypes, textual prototypes and `seen` after a step (PAF)."""
    # class means of the batch
    sums = torch.zeros_like(memory["visual"]).index_add(0, labels, forward.labeled)  # (K, D)
    counts = torch.zeros_like(memory["prior"]).index_add(0, labels, torch.ones_like(forward.labeled[:, 0]))
    means = sums / counts.clamp(min=1).unsqueeze(1)

    # visual prototypes; the first mean of a class is taken as it is
    momentum = config.visual_momentum * memory["seen"].to(sums.dtype).unsqueeze(1)
    moved = F.normalize(momentum * memory["visual"] + (1 - momentum) * means, dim=-1)
    visual = torch.where((counts > 0).unsqueeze(1), moved, memory["visual"])
    seen = memory["seen"] | (counts > 0)

    # class prior
    prior = torch.lerp(forward.mean_probabilities, memory["prior"], config.rho)
    prior = prior / prior.sum()

    # textual prototypes move towards the visual ones
    pace = (config.mu * prior / prior.max() * seen).unsqueeze(1)
    textual = parameters["heads"][len(prior) :]
    pulled = F.normalize(torch.lerp(F.normalize(textual, dim=-1), visual, pace), dim=-1)
    prototypes = torch.where(seen.unsqueeze(1), pulled, textual)
    return {"prior": prior, "visual": visual, "seen": seen, "prototypes": prototypes}


def first_weights(prototypes: Tensor, rank: int) -> Tensors:
    """A trial before its first step: both heads at unit prototypes (K, D), an adapter that does nothing yet."""
    dim = prototypes.shape[1]
    return {
        "heads": torch.cat([prototypes, prototypes]),
        "scale": prototypes.new_ones(dim),
        "shift": prototypes.new_zeros(dim),
        "down": torch.randn(dim, rank, device=prototypes.device) * (2 / dim) ** 0.5,
        "up": prototypes.new_zeros(rank, dim),
    }


def new_memory(log_prior: Tensor, dim: int) -> Tensors:
    """What a trial keeps beside its parameters, before the first step; log_prior (K,)."""
    classes = len(log_prior)
    return {
        "prior": torch.full_like(log_prior, 1.0 / classes),
        "visual": log_prior.new_zeros(classes, dim),
        "seen": torch.zeros(classes, dtype=torch.bool, device=log_prior.device),
        "log_prior": log_prior,
        "identity": torch.eye(classes, dtype=log_prior.dtype, device=log_prior.device),
    }


class EagerTrial:
    """One trial: parameters, optimiser, schedule, and a step on an explicit mini-batch.

    Args:
        config: hyper-parameters; all numbers are honoured, switches must be the defaults.
        parameters: heads (2K, D), linear above prototypes; scale, shift (D,); down (D, r); up (r, D). Taken over.
        log_prior: log class frequencies of the labelled images (K,).
        backend: of torch.compile for the forward pass and PAF; None compiles nothing.
        optimizer: implementation of torch.optim.SGD, "fused" or "foreach".

    Raises:
        InputError: a config that the loop does not do.
    """

    def __init__(
        self,
        config: FitConfig,
        parameters: Tensors,
        log_prior: Tensor,
        *,
        backend: str | None = None,
        optimizer: str = "fused",
    ) -> None:
        check_config(config)
        self.config = config
        self.done = 0
        self.parameters = {name: tensor.requires_grad_(True) for name, tensor in parameters.items()}
        self.memory = new_memory(log_prior, parameters["heads"].shape[1])
        self.optimizer = _sgd(config, self.parameters, optimizer)
        self._forward_pass = _compiled(forward_pass, backend)
        self._fitted_prototypes = _compiled(fitted_prototypes, backend)

    def step(self, batch: Views) -> Tensor:
        """One optimiser step; the three losses (3,)."""
        forward = self._forward_pass(self.parameters, self.memory, batch, self.config)
        ramp = _set_schedule(self.optimizer, self.config, self.done)
        (forward.losses[0] + ramp * forward.losses[1] + forward.losses[2]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        with torch.no_grad():
            moved = self._fitted_prototypes(self.parameters, self.memory, batch.labels, forward, self.config)
            self.parameters["heads"][len(forward.mean_probabilities) :] = moved.pop("prototypes")
        self.memory.update(moved)
        losses: Tensor = forward.losses.detach()
        return losses


class VmapTrials:
    """T trials of the same hyper-parameters, by vmap over :func:`forward_pass` and :func:`fitted_prototypes`.

    Args:
        config: as :class:`EagerTrial` takes it.
        parameters: as :class:`EagerTrial` takes them, each with a leading axis T.
        log_prior: log class frequencies of the labelled images, the same for all trials (K,).

    Raises:
        InputError: a config that the loop does not do.
    """

    def __init__(self, config: FitConfig, parameters: Tensors, log_prior: Tensor) -> None:
        check_config(config)
        self.config = config
        self.done = 0
        self.parameters = parameters
        trials, _, dim = parameters["heads"].shape
        memory = new_memory(log_prior, dim)
        self.shared = {name: memory.pop(name) for name in ("log_prior", "identity")}
        self.memory = {name: tensor.expand(trials, *tensor.shape).clone() for name, tensor in memory.items()}
        self.optimizer = _sgd(config, parameters, "fused")
        self._gradients = torch.func.vmap(torch.func.grad_and_value(self._total, has_aux=True), in_dims=(0, 0, 0, None))
        self._fitted_prototypes = torch.func.vmap(self._fit_one)

    def _total(self, parameters: Tensors, memory: Tensors, batch: Views, ramp: float) -> tuple[Tensor, ForwardPass]:
        forward = forward_pass(parameters, {**memory, **self.shared}, batch, self.config)
        return forward.losses[0] + ramp * forward.losses[1] + forward.losses[2], forward

    def _fit_one(self, parameters: Tensors, memory: Tensors, labels: Tensor, forward: ForwardPass) -> Tensors:
        return fitted_prototypes(parameters, memory, labels, forward, self.config)

    @torch.no_grad()
    def step(self, batch: Views) -> Tensor:
        """One optimiser step on a batch with a leading axis T; the three losses (3, T)."""
        ramp = _set_schedule(self.optimizer, self.config, self.done)
        gradients, (_, forward) = self._gradients(self.parameters, self.memory, batch, ramp)
        for name, tensor in self.parameters.items():
            tensor.grad = gradients[name]
        self.optimizer.step()
        self.done += 1
        moved = self._fitted_prototypes(self.parameters, self.memory, batch.labels, forward)
        self.parameters["heads"][:, forward.mean_probabilities.shape[1] :] = moved.pop("prototypes")
        self.memory.update(moved)
        losses: Tensor = forward.losses.T
        return losses


def _sgd(config: FitConfig, parameters: Tensors, implementation: str) -> torch.optim.SGD:
    """PyTorch's optimiser, "fused" or "foreach"."""
    return torch.optim.SGD(
        list(parameters.values()),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )


def _set_schedule(optimizer: torch.optim.SGD, config: FitConfig, step: int) -> float:
    """Set the cosine learning rate of a step, counted from 0; returns the factor of its unlabelled loss."""
    optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return min(1.0, (step + 1) / config.steps / max(config.warmup, 1e-9))


def _compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    return function if backend is None else torch.compile(function, backend=backend)
