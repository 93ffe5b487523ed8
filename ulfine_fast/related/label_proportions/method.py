"""Two-stage learning from label proportions, PLOT (arXiv 2105.10635): bags of images and each bag's class proportions.

Stage one fits a bag's mean prediction to its proportions. Stage two gives every image a label, by entropic transport of
the bag's predictions onto its proportions, and learns from these with symmetric cross-entropy and mixup. Not from the
paper but ours: transport at epsilon 1, the weights and Beta(8, 8), and the start at the class texts, without which
classes could not be identified. Mixup is of features; there is no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.step import FusedStep
from ulfine_fast.core.heads import cosine_logits
from ulfine_fast.core.types import Batch, Inputs, Losses, Pool, State, Trials
from ulfine_fast.data.splits import Split, training_labels
from ulfine_fast.methods.linear_probe import LinearProbe
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.philox import Purpose, integers, words
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.transport import sinkhorn
from ulfine_fast.related.label_proportions.bags import Bags, PaddedBags, draw_bags
from ulfine_fast.related.label_proportions.files import bag_split, read_bags
from ulfine_fast.related.label_proportions.losses import beta_draws, proportion_loss, symmetric_cross_entropy

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class ProportionsOptions:
    """Options of :class:`Proportions`."""

    bags: str | None = option(None, "CSV of bags of images, id and bag; with proportions", structural=True)
    proportions: str | None = option(
        None, "CSV of the class proportions of bags: bag, class and share, or a column for each class", structural=True
    )
    bag_size: int = option(0, "images in a bag, to draw bags from labelled images; 0 where bags are given", low=0)
    stage_one: float = option(
        0.6, "fraction of the steps that learn from bags, before images get labels", low=0.0, high=1.0
    )
    bag_labels: str = option(
        "sinkhorn",
        "labels of stage two, predictions transported onto their bag's proportions or as they are",
        choices=("sinkhorn", "argmax"),
        structural=True,
    )
    reverse_weight: float = option(0.1, "weight of the reverse cross-entropy in stage two", low=0.0)
    mixup: int = option(
        8, "a of the Beta(a, a) that mixes features in stage two; 0 mixes none", low=0, high=64, structural=True
    )


@dataclass(frozen=True)
class BagBatch(Batch):
    """A mini-batch of whole bags: its labelled rows are the images of G bags, B = G m, and every label is -1.

    Attributes:
        bag_positions: which bags of each trial these are (T, G).
        present: bool (T, G, m), False for padding.
        proportions: class proportions of the bags (T, G, K).
    """

    bag_positions: Tensor = field(kw_only=True)
    present: Tensor = field(kw_only=True)
    proportions: Tensor = field(kw_only=True)


@dataclass(frozen=True)
class BagSource(BatchSource):
    """Draws mini-batches of whole bags: as many as make `batch_labeled` images, and at least one.

    Attributes:
        bags: of all trials.
    """

    bags: PaddedBags = field(kw_only=True)

    def draw(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """Mini-batches of steps [start, stop), gathered."""
        bags = self.bags
        steps = torch.arange(start, stop, device=self.labels.device)
        count = max(1, self.config.batch_labeled // bags.index.shape[-1])
        positions = integers(self.trials.seeds, steps, Purpose.LABELED, count, bags.count)  # (S, T, G)
        trial = torch.arange(len(bags.count), device=positions.device).view(1, -1, 1)
        rows = bags.index[trial, positions].flatten(2)  # (S, T, G m)
        slots = self.features.slots(rows, self.labeled_views(rows, steps))
        present = bags.present[trial, positions]  # (S, T, G, m)
        proportions = bags.proportions[trial, positions]  # (S, T, G, K)
        for i, step in enumerate(range(start, stop)):
            features = self.noisy(self.features.at(slots[i]), step, Purpose.LABELED_NOISE)  # (T, G m, D)
            batch = BagBatch(
                features,
                torch.full_like(slots[i], -1),
                bag_positions=positions[i],
                present=present[i],
                proportions=proportions[i],
            )
            yield step, batch


@register("proportions", options=ProportionsOptions, source="PLOT, arXiv 2105.10635", defaults={"lr": 0.03})
class Proportions(LinearProbe):
    """The head of `linear_probe`, trained on class proportions of bags; no image's own label is read."""

    uses_labels = False
    uses_pool = True

    # -- before training

    def split(self, cache: FeatureCache, config: FitConfig) -> Split | None:
        """The split that trains on the bags of the two files that the config names, if any."""
        if config.bags is None and config.proportions is None:
            return None
        if config.bags is None or config.proportions is None:
            single, other = ("bags", "proportions") if config.proportions is None else ("proportions", "bags")
            raise InputError(f"{single} says nothing without {other}; give both")
        return bag_split(cache, read_bags(config.bags, config.proportions, cache))

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse a trial without texts, without bags, or whose stage two would never begin."""
        if cache.prototypes is None:
            raise InputError(
                "method proportions starts from texts of the classes, which this cache does not hold; make it with "
                "extract, or give from_arrays text_features"
            )
        bags = split.extra.get("bags")
        if bags is None and not config.bag_size:
            raise InputError(
                "method proportions learns from bags and has none; give --bags and --proportions, or set bag_size to "
                "draw bags from labelled images"
            )
        # images get their labels at validations alone
        begins = -(-config.stage_one * config.steps // config.eval_every) * config.eval_every
        if config.stage_one < 1 and begins >= config.steps:
            raise InputError(
                f"stage two begins at a validation and none of every {config.eval_every} steps comes between "
                f"stage_one {config.stage_one:g} and step {config.steps}; lower eval_every, or set stage_one to 1"
            )
        if bags is not None and config.bag_size not in (0, self.rows_together(split)):
            raise InputError(f"bag_size is {config.bag_size} and the split has bags of its own; set bag_size to 0")

    def prepare(self, cache: FeatureCache, config: FitConfig, split: Split) -> Split:
        """The split as it is where it has bags, else with its labelled images put into bags."""
        if "bags" in split.extra:
            return split
        classes = len(cache.class_names)
        labels = training_labels(cache.labels, split, classes, config)
        bags = draw_bags(split.labeled, labels, config.bag_size, classes, config.data_seed)
        return replace(split, extra={**split.extra, "bags": bags.to_list(cache.ids)})

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """The bags of each trial."""
        by_split = {id(split): Bags.from_list(split.extra["bags"], cache.row_of) for split in splits}
        return Inputs(per_trial={"bags": PaddedBags.pad([by_split[id(split)] for split in splits], device)})

    def batches(self, source: BatchSource) -> BatchSource:
        """A source of whole bags."""
        return BagSource(
            labels=source.labels,
            labeled=source.labeled,
            unlabeled=source.unlabeled,
            trials=source.trials,
            features=source.features,
            config=source.config,
            pairs=source.pairs,
            bags=source.trials.inputs.per_trial["bags"],
        )

    def rows_together(self, split: Split) -> int:
        """Images in the largest bag: a trial must not take as many bags as a neighbour's smaller ones allow."""
        return max((len(bag["ids"]) for bag in split.extra.get("bags", ())), default=1)

    # -- training

    def start(self, trials: Trials) -> State:
        """The linear head (T, K, D) at the textual prototypes, and the step (T,)."""
        state = super().start(trials)
        state.scratch["step"] = torch.zeros_like(trials.seeds)
        return state

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Label the images of all bags again (T, G, m), in trials that are in stage two."""
        bags: PaddedBags = trials.inputs.per_trial["bags"]
        late = step >= trials.values["stage_one"] * trials.config.steps  # (T,)
        state.scratch["late"] = late
        labels = torch.zeros_like(bags.index)
        if bool(late.any()):
            rows = pool.features.rows(bags.index.flatten(1))  # (T, G m, D)
            logits = self.logits(trials, state.tensors, rows).unflatten(1, labels.shape[1:])
            if trials.config.bag_labels == "sinkhorn":
                logits = sinkhorn(logits, bags.proportions, bags.present)
            labels = logits.argmax(-1)
        state.scratch["labels"] = labels

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """The loss of the stage that a trial is in (T,)."""
        assert isinstance(batch, BagBatch)
        by_labels = self._by_labels(trials, state, batch)
        loss = torch.where(state.scratch["late"], by_labels, self._by_proportions(trials, state, batch))
        return Losses.labeled_only(loss)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step."""
        state.scratch["step"] += 1

    def fused(self, trials: Trials, state: State) -> type[FusedStep] | None:
        """None: the losses are others."""
        return None

    def _by_proportions(self, trials: Trials, state: State, batch: BagBatch) -> Tensor:
        """Mean loss of the batch's bags (T,)."""
        logits = self.logits(trials, state.tensors, batch.labeled)
        logits = logits.unflatten(1, batch.present.shape[1:])  # (T, G, m, K)
        return proportion_loss(logits, batch.proportions, batch.present).mean(-1)

    def _by_labels(self, trials: Trials, state: State, batch: BagBatch) -> Tensor:
        """Mean symmetric cross-entropy of the batch's images (T,), each mixed with another."""
        positions = batch.bag_positions.unsqueeze(-1).expand(-1, -1, batch.present.shape[-1])
        labels = state.scratch["labels"].gather(1, positions).flatten(1)  # (T, B)
        targets = F.one_hot(labels, trials.prototypes.shape[1]).to(batch.labeled.dtype)  # (T, B, K)
        present = batch.present.flatten(1)
        rows, targets = self._mixed(trials, state, batch.labeled, targets, present)
        logits = cosine_logits(rows, state.parameters["linear"], trials.values["scale"])
        losses = symmetric_cross_entropy(logits, targets, trials.values["reverse_weight"])
        return (losses * present).sum(-1) / present.sum(-1)

    def _mixed(
        self, trials: Trials, state: State, rows: Tensor, targets: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit rows (T, B, D) and targets (T, B, K), each l times itself plus 1 - l times a partner, l ~ Beta(a, a)."""
        drawn = 2 * trials.config.mixup
        if not drawn:
            return rows, targets
        step, count = state.scratch["step"][:1], rows.shape[1]
        numbers = words(trials.seeds, step, Purpose.BLEND, count * drawn)[0].view(-1, count, drawn)  # (T, B, 2 a)
        weight = beta_draws(numbers[..., 1:].to(rows.dtype) / 2**32).unsqueeze(-1)
        # present rows come first in this order, so that no partner is padding
        order = present.logical_not().long().sort(dim=-1, stable=True).indices
        partner = order.gather(1, (numbers[..., 0] * present.sum(-1, keepdim=True)) >> 32).unsqueeze(-1)
        mixed_rows = weight * rows + (1 - weight) * rows.gather(1, partner.expand(-1, -1, rows.shape[-1]))
        other_targets = targets.gather(1, partner.expand(-1, -1, targets.shape[-1]))
        return normalize(mixed_rows), weight * targets + (1 - weight) * other_targets
