"""Linear probe: a classifier on frozen features, on labelled images alone.

By default a cosine classifier from the textual prototypes, by SGD; semantic-aware initialisation, scale and logit
adjustment follow LIFT (arXiv 2309.10019, section 4). With solver "converged" it is the minimum of the loss over all
labelled images: a cosine head, or multinomial logistic regression as CLIP and DINOv2 are evaluated by (arXiv
2103.00020, appendix A.3; arXiv 2304.07193, appendix B.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.threads import interleaved
from ulfine_fast.core.types import Batch, Losses, Pool, State, Trials
from ulfine_fast.methods.base import LabeledOptions, Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.logistic import AXES_ROWS, Axes, LogisticFit, Stop, fit_affine, fit_cosine, paths, principal_axes
from ulfine_fast.ops.losses import adjusted_cross_entropy

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.data.splits import Split

# trials of different splits are fitted over the union of their rows, where it has at most so many times their own
_UNION = 1.5
# log frequency that a class without labels is below
_NO_LABELS = math.log(2e-8)


@dataclass(frozen=True)
class LinearProbeOptions(LabeledOptions):
    """Options of :class:`LinearProbe`."""

    solver: str = option(
        "sgd",
        "sgd trains on mini-batches; converged minimises the loss of all labelled images, by L-BFGS",
        choices=("sgd", "converged"),
        structural=True,
    )
    head: str = option(
        "cosine",
        "cosine, from the texts; or affine, from zero with a bias; affine needs solver converged",
        choices=("cosine", "affine"),
        structural=True,
    )
    ridge: float = option(
        1.0,
        "solver converged: penalty, 1 / C of scikit-learn, on an affine head's weights or a cosine head's way from "
        "the texts",
        low=0.0,
        search={"low": 1e-5, "high": 1e6, "log": True, "points": 45},
    )
    class_weighted: bool = option(False, "solver converged: weigh images by the inverse frequency of their class")
    train_views: str = option(
        "plain",
        "solver converged: views of the labelled images, plain, or weak ones too",
        choices=("plain", "weak"),
        structural=True,
    )


@register("linear_probe", options=LinearProbeOptions, source="after LIFT, arXiv 2309.10019")
class LinearProbe(Method):
    """CE(z + tau log pi, y) over a linear head; no adapter, no unlabelled images."""

    uses_unlabeled = False
    not_read = frozenset({"head", "ridge", "class_weighted", "train_views"})

    @classmethod
    def of(cls, config: FitConfig) -> Method:
        """The way of fitting that the solver names."""
        return ConvergedProbe() if cls is LinearProbe and config.solver == "converged" else cls()

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse options of the other solver.

        Raises:
            InputError: one that is not at its default.
        """
        if type(self) is not LinearProbe:
            return
        default = FitConfig(method="linear_probe")
        for name in sorted(self.not_read):
            if getattr(config, name) != getattr(default, name):
                raise InputError(
                    f"{name} {getattr(config, name)} is read by solver converged alone; add --solver converged or "
                    f"leave {name} out"
                )

    def start(self, trials: Trials) -> State:
        """A linear head (T, K, D) at the textual prototypes."""
        return State({"linear": trials.prototypes.clone()})

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """Logit-adjusted cross-entropy of the labelled images."""
        logits = self.logits(trials, state.tensors, batch.labeled)  # (T, B, K)
        loss = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, trials.values["tau"]).mean(-1)
        return Losses.labeled_only(loss)

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """One head."""
        return FusedStep if type(self) is LinearProbe else None

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, w_k), shape (T, B, K)."""
        return cosine_logits(features, tensors["linear"], trials.values["scale"])


class ConvergedProbe(LinearProbe):
    """The minimum of sum_n w_n CE(z_n + tau log pi, y_n) + penalty over all labelled images; see `ops/logistic.py`."""

    trains = False
    uses_pool = True
    not_read = frozenset()

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse weak views of a cache without any.

        Raises:
            InputError: the cache has none.
        """
        if config.train_views == "weak" and not cache.views("weak").shape[1]:
            raise InputError(
                "train_views weak needs weak views and this cache has views.weak = 0; extract again with --weak 1"
            )

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """Logits, and the pairs of steps and gradients; rows are held once for all trials, as the cache is."""
        rows = images * (views if config.train_views == "weak" else 1)
        return 6 * rows * (classes + 1) + 40 * classes * (dim + 1)

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D), until the labelled images have been read."""
        state = State({}, {"linear": trials.prototypes.clone()})
        if trials.config.head == "affine":
            state.memory["bias"] = torch.zeros_like(trials.log_prior)
        return state

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fit all trials; those that read the same images share one product."""
        # one basis for all trials, and the same whichever trials are fitted together
        count = len(pool.features.plain)
        every = torch.arange(0, count, -(-count // AXES_ROWS), device=pool.labels.device)
        axes = principal_axes(pool.features.rows(every))
        stops, steps = torch.zeros_like(trials.seeds), torch.zeros_like(trials.seeds)
        done = 0
        for group in _groups(pool, trials.log_prior.shape[1]):
            own = group.trials

            # rows, each with its views, and their weights
            rows = pool.features.rows(group.rows).unsqueeze(1)  # (N, 1, D)
            if trials.config.train_views == "weak":
                rows = pool.features.all_views(group.rows.unsqueeze(0))[0, :, : pool.features.easy]  # (N, V, D)
            views = rows.shape[1]
            labels = group.labels.repeat_interleave(views)
            log_prior = trials.log_prior[own]
            weights = group.counts.to(rows.dtype)  # (t, N)
            inverse = torch.exp(-log_prior) / (log_prior > _NO_LABELS).sum(1, keepdim=True)  # (t, K)
            balanced = trials.values["class_weighted"][own].unsqueeze(1) > 0
            weights = torch.where(balanced, weights * inverse[:, group.labels], weights)
            weights = weights.repeat_interleave(views, 1) / views

            # cores work on different trials: on whole paths of affine heads, else each on strong and weak penalties
            units = torch.arange(len(own), device=own.device)
            if trials.config.head == "affine":
                units = paths(weights, trials.values["tau"][own].unsqueeze(1) * log_prior)
            cores = 1 if rows.is_cuda else min(torch.get_num_threads(), int(units.max()) + 1)
            parts = [(units % cores == core).nonzero().squeeze(1) for core in range(cores)]
            fits = [_fit(trials, own[part], rows.flatten(0, 1), labels, weights[part], axes) for part in parts]
            for positions, fit in fits[0] if cores == 1 else interleaved(fits):
                state.memory["linear"][positions] = fit.weight
                if trials.config.head == "affine":
                    state.memory["bias"][positions] = fit.bias
                stops[positions], steps[positions] = fit.stop, fit.steps
                done += len(positions)
                pool.report(done / len(stops))
        state.scratch |= {
            "converged": (stops <= Stop.ROUNDING).to(trials.log_prior),
            "separable": (stops == Stop.SEPARABLE).to(trials.log_prior),
            "solver_steps": steps,
        }

    def evidence(self, trials: Trials, state: State) -> Tensors:
        """Whether the solver converged, whether the loss has no minimum, and how many steps it made."""
        names = ("converged", "separable", "solver_steps")
        return {name: state.scratch[name] for name in names if name in state.scratch}

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, w_k), or w_k x + b_k of an affine head, shape (T, B, K)."""
        if "bias" not in tensors:
            return super().logits(trials, tensors, features)
        return torch.baddbmm(tensors["bias"].unsqueeze(1), features, tensors["linear"].transpose(1, 2))


class _Group(NamedTuple):
    """Trials that are fitted over the same labelled images.

    Attributes:
        trials: positions of the trials (t,).
        rows: rows of the cache, one for each image and label (N,).
        labels: their classes (N,).
        counts: how often each trial has them (t, N).
    """

    trials: Tensor
    rows: Tensor
    labels: Tensor
    counts: Tensor


def _groups(pool: Pool, classes: int) -> Iterator[_Group]:
    """All trials over the union of their images where they share most of them, else the trials of each split."""
    known = pool.labels >= 0
    # an image that has other labels in other trials, by label noise, is another row
    keys = torch.where(known, pool.labeled_rows * classes + pool.labels, -1)  # (T, L)
    union = keys[known].unique()
    if len(keys) * len(union) <= _UNION * int(known.sum()):
        members = [torch.arange(len(keys), device=keys.device)]
    else:
        _, number = keys.sort(1).values.unique(dim=0, return_inverse=True)
        members = [(number == i).nonzero().squeeze(1) for i in range(int(number.max()) + 1)]
    for trials in members:
        own, present = keys[trials], known[trials]
        distinct = own[present].unique()
        position = torch.searchsorted(distinct, own.clamp(min=int(distinct[0])))
        counts = torch.zeros(len(trials), len(distinct), dtype=torch.int64, device=keys.device)
        counts.scatter_add_(1, position, present.long())
        yield _Group(trials, distinct // classes, distinct % classes, counts)


def _fit(
    trials: Trials, own: Tensor, rows: Tensor, labels: Tensor, weights: Tensor, axes: Axes
) -> Iterator[tuple[Tensor, LogisticFit]]:
    """Fit the trials at positions `own` to rows (N, D) by weight (t, N); yields the positions and the heads.

    Args:
        trials: all trials.
        own: (t,).
        rows: (N, D).
        labels: (N,).
        weights: (t, N).
        axes: of the features.
    """
    values = {name: tensor[own] for name, tensor in trials.values.items()}
    log_prior = trials.log_prior[own]
    offsets = values["tau"].unsqueeze(1) * log_prior
    with torch.no_grad():  # a setting of each thread
        if trials.config.head == "cosine":
            start, scale = trials.prototypes[own], values["scale"]
            fit = fit_cosine(rows, labels, weights, values["ridge"], start, scale, offsets=offsets, axes=axes)
        else:
            # a class without labels would push its bias down without end
            offsets = offsets.masked_fill(log_prior <= _NO_LABELS, -torch.inf)
            fit = fit_affine(rows, labels, weights, values["ridge"], offsets=offsets, axes=axes)
    yield own, fit
