"""A method from outside the package, as a user would write it: one file, with an option of its own."""

from __future__ import annotations

from dataclasses import dataclass

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.prototypes import class_means, normalize


@dataclass(frozen=True)
class ToyOptions:
    toy_weight: float = option(
        1.0, "weight of the class mean beside the text", low=0.0, search={"low": 0.1, "high": 10.0, "log": True}
    )


@register("toy", options=ToyOptions, source="nearest mean")
class Toy(Method):
    """Class means beside the texts."""

    trains = False
    uses_unlabeled = False
    uses_pool = True

    def start(self, trials: Trials) -> State:
        return State({}, {"prototypes": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        classes = trials.prototypes.shape[1]
        # padding has label -1: it counts for a class of its own, which is dropped
        labels = pool.labels.masked_fill(pool.labels < 0, classes)
        means, counts = (part[:, :classes] for part in class_means(pool.labeled, labels, classes + 1))
        weight = trials.values["toy_weight"].view(-1, 1, 1) * (counts > 0).unsqueeze(-1)
        state.memory["prototypes"] = normalize(trials.prototypes + weight * means)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensors) -> Tensors:
        return cosine_logits(features, tensors["prototypes"], trials.values["scale"])
