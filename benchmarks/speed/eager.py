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

_DEFAULTS = ("adapter", "alpha", "prior", "orthogonality", "align", "paf", "dlf", "adjust_similarity", "sharpen")


class Views(NamedTuple):
    """A mini-batch of unit float32 features: labelled (B, D) with labels (B,), weak and strong (U, D)."""

    labeled: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor


@dataclass(frozen=True)
class Images:
    """Features in memory, as unit float32 rows, view after view of each image.

    Attributes:
        easy: plain and weak views of labelled images (L * V, D). labels: (L,).
        weak: plain and weak views of unlabelled images (U * V, D). strong: their strong views (U * W, D).
        counts: V and W.
    """

    easy: Tensor
    labels: Tensor
    weak: Tensor
    strong: Tensor
    counts: tuple[int, int]

    def draw(self, labeled: int, unlabeled: int) -> Views:
        """As many images and views, drawn with replacement."""
        device, (easy, strong) = self.labels.device, self.counts
        rows = torch.randint(len(self.labels), (labeled,), device=device)
        hidden = torch.randint(len(self.weak) // easy, (unlabeled,), device=device)
        # the view's number is drawn too, and an image's views stand side by side
        first = rows * easy + torch.randint(easy, (labeled,), device=device)
        weak = hidden * easy + torch.randint(easy, (unlabeled,), device=device)
        hard = hidden * strong + torch.randint(strong, (unlabeled,), device=device)
        return Views(
            self.easy.index_select(0, first),
            self.labels.index_select(0, rows),
            self.weak.index_select(0, weak),
            self.strong.index_select(0, hard),
        )


def check_config(config: FitConfig) -> None:
    """Refuse what the plain loop does not do.

    Raises:
        InputError: another method, or a switch of ULFine that is not at its default.
    """
    plain = FitConfig()
    changed = [name for name in ("method", *_DEFAULTS) if getattr(config, name) != getattr(plain, name)]
    if changed:
        raise InputError(f"the eager loop is ulfine with default switches, got {changed[0]}")


def adapt(parameters: Tensors, rows: Tensor, strength: float) -> Tensor:
    """Unit features (n, D) after the adapter."""
    standard = F.layer_norm(rows, rows.shape[-1:], parameters["scale"], parameters["shift"])
    hidden = torch.relu(standard @ parameters["down"])  # (n, r)
    return F.normalize(torch.addmm(rows, hidden, parameters["up"], alpha=strength), dim=-1)


class Found(NamedTuple):
    """What a forward pass gives.

    Attributes:
        parts: labelled, unlabelled and regularising loss (3,).
        guesses: mean probability of each class on weak views (K,), without gradients.
        rows: adapted labelled rows (B, D), without gradients.
    """

    parts: Tensor
    guesses: Tensor
    rows: Tensor


def losses(parameters: Tensors, memory: Tensors, batch: Views, config: FitConfig) -> Found:
    """The losses of a mini-batch."""
    classes, size = memory["prior"].shape[-1], len(batch.labels)
    # one product for both heads, and one for all rows that get gradients
    heads = F.normalize(parameters["heads"], dim=-1)  # (2K, D)
    with torch.no_grad():
        weak = adapt(parameters, batch.weak, config.adapter_scale) @ heads.T * config.scale  # (U, 2K)
        guesses = torch.softmax(_fused(weak[:, :classes], weak[:, classes:], config.eta), -1)  # (U, K)
        confidence, labels = guesses.max(-1)
        mask = (confidence >= config.threshold).to(guesses.dtype)
    rows = adapt(parameters, torch.cat([batch.labeled, batch.strong]), config.adapter_scale)
    logits = (rows @ heads.T * config.scale).view(-1, 2, classes)  # (B + U, 2, K)
    # both heads of a row are two rows with the same label
    own = (logits[:size] + config.tau * memory["log_prior"]).flatten(0, 1)
    labeled = 2 * F.cross_entropy(own, _twice(batch.labels))
    hard = (logits[size:] + config.tau_u * torch.log(memory["prior"] + 1e-8)).flatten(0, 1)
    each = F.cross_entropy(hard, _twice(labels), reduction="none")
    unlabeled = 2 * config.lambda_u * (each * _twice(mask)).mean()
    gram = heads[classes:] @ heads[classes:].T  # (K, K)
    penalty = (gram - memory["identity"]).square().mean()
    return Found(torch.stack([labeled, unlabeled, config.lambda_o * penalty]), guesses.mean(0), rows[:size].detach())


def _twice(values: Tensor) -> Tensor:
    """Each value (n,) for both heads (2n,)."""
    return values.unsqueeze(1).expand(-1, 2).flatten()


@torch.no_grad()
def logits_of(parameters: Tensors, rows: Tensor, config: FitConfig) -> Tensor:
    """Fused logits (n, K) of unit features (n, D): what the trial predicts from."""
    heads = F.normalize(parameters["heads"], dim=-1)
    both = adapt(parameters, rows, config.adapter_scale) @ heads.T * config.scale
    return _fused(both[:, : len(heads) // 2], both[:, len(heads) // 2 :], config.eta)


def _fused(linear: Tensor, similarity: Tensor, eta: float) -> Tensor:
    """The linear head's logits (n, K) at the similarity head's mean and deviation, mixed with the latter's."""
    # lengths of the centred rows, as torch.var_mean is slower on a processor
    centred, level = linear - linear.mean(-1, keepdim=True), similarity.mean(-1, keepdim=True)
    spread, wanted = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (centred, similarity - level))
    aligned = torch.addcmul(level, centred, (wanted + 1e-6) / (spread + 1e-6))
    return torch.lerp(similarity, aligned, eta)


def fitted(parameters: Tensors, memory: Tensors, labels: Tensor, found: Found, config: FitConfig) -> Tensors:
    """The prior, visual prototypes and textual prototypes after a step (PAF); `seen` too."""
    sums = torch.zeros_like(memory["visual"]).index_add(0, labels, found.rows)  # (K, D)
    counts = torch.zeros_like(memory["prior"]).index_add(0, labels, torch.ones_like(found.rows[:, 0]))
    means = sums / counts.clamp(min=1).unsqueeze(1)
    # a first sighting takes the mean itself
    momentum = config.visual_momentum * memory["seen"].to(sums.dtype).unsqueeze(1)
    moved = F.normalize(momentum * memory["visual"] + (1 - momentum) * means, dim=-1)
    visual = torch.where((counts > 0).unsqueeze(1), moved, memory["visual"])
    seen = memory["seen"] | (counts > 0)
    prior = torch.lerp(found.guesses, memory["prior"], config.rho)
    prior = prior / prior.sum()
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
        backend: of torch.compile for losses and PAF; None compiles nothing.
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
        self.config, self.done = config, 0
        self.parameters = {name: tensor.requires_grad_(True) for name, tensor in parameters.items()}
        self.memory = new_memory(log_prior, parameters["heads"].shape[1])
        self.optimizer = _sgd(config, self.parameters, optimizer)
        self._losses, self._fitted = _compiled(losses, backend), _compiled(fitted, backend)

    def step(self, batch: Views) -> Tensor:
        """One optimiser step; the three losses (3,)."""
        found = self._losses(self.parameters, self.memory, batch, self.config)
        ramp = _schedule(self.optimizer, self.config, self.done)
        (found.parts[0] + ramp * found.parts[1] + found.parts[2]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        with torch.no_grad():
            moved = self._fitted(self.parameters, self.memory, batch.labels, found, self.config)
            self.parameters["heads"][len(found.guesses) :] = moved.pop("prototypes")
        self.memory.update(moved)
        return found.parts.detach()


class VmapTrials:
    """T trials of the same hyper-parameters, by torch.func.vmap over :func:`losses` and :func:`fitted`.

    Args:
        config: as :class:`EagerTrial` takes it.
        parameters: as it takes them, each with a leading axis T.
        log_prior: log class frequencies of the labelled images, the same for all trials (K,).

    Raises:
        InputError: a config that the loop does not do.
    """

    def __init__(self, config: FitConfig, parameters: Tensors, log_prior: Tensor) -> None:
        check_config(config)
        self.config, self.done, self.parameters = config, 0, parameters
        trials = len(parameters["heads"])
        own = new_memory(log_prior, parameters["heads"].shape[2])
        self.shared = {name: own.pop(name) for name in ("log_prior", "identity")}
        self.memory = {name: tensor.expand(trials, *tensor.shape).clone() for name, tensor in own.items()}
        self.optimizer = _sgd(config, parameters, "fused")
        self._gradients = torch.func.vmap(torch.func.grad_and_value(self._total, has_aux=True), in_dims=(0, 0, 0, None))
        self._moves = torch.func.vmap(self._moved)

    def _total(self, parameters: Tensors, memory: Tensors, batch: Views, ramp: float) -> tuple[Tensor, Found]:
        found = losses(parameters, {**memory, **self.shared}, batch, self.config)
        return found.parts[0] + ramp * found.parts[1] + found.parts[2], found

    def _moved(self, parameters: Tensors, memory: Tensors, labels: Tensor, found: Found) -> Tensors:
        return fitted(parameters, memory, labels, found, self.config)

    @torch.no_grad()
    def step(self, batch: Views) -> Tensor:
        """One optimiser step on a batch with a leading axis T; the three losses (3, T)."""
        ramp = _schedule(self.optimizer, self.config, self.done)
        gradients, (_, found) = self._gradients(self.parameters, self.memory, batch, ramp)
        for name, tensor in self.parameters.items():
            tensor.grad = gradients[name]
        self.optimizer.step()
        self.done += 1
        moved = self._moves(self.parameters, self.memory, batch.labels, found)
        self.parameters["heads"][:, found.guesses.shape[1] :] = moved.pop("prototypes")
        self.memory.update(moved)
        return found.parts.T


def _sgd(config: FitConfig, parameters: Tensors, kind: str) -> torch.optim.SGD:
    """PyTorch's optimiser, "fused" or "foreach"."""
    return torch.optim.SGD(
        list(parameters.values()),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=kind == "fused",
        foreach=kind == "foreach",
    )


def _schedule(optimizer: torch.optim.SGD, config: FitConfig, done: int) -> float:
    """Set the cosine learning rate of a step, counted from 0; the factor of its unlabelled loss."""
    optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done / config.steps))
    return min(1.0, (done + 1) / config.steps / max(config.warmup, 1e-9))


def _compiled(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    return function if backend is None else torch.compile(function, backend=backend)
