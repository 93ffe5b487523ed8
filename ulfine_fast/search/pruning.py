"""Which trials stop early: successive halving and Hyperband over trials that train side by side.

SOURCE: Jamieson and Talwalkar, arXiv 1502.07943 (successive halving); Li et al., arXiv 1603.06560 (Hyperband).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.search.choices import Pruning

PRUNINGS: tuple[str, ...] = get_args(Pruning)
ETA = 3
"""One in ETA trials continues at a rung (the value of the Hyperband paper)."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def rungs(steps: int, eval_every: int) -> list[int]:
    """Steps at which trials are compared: steps / 27, / 9 and / 3, each rounded up to an evaluation.

    Args:
        steps: of a whole trial, at least 1.
        eval_every: steps between evaluations, at least 1.

    Returns:
        Ascending, without the last evaluation, where nothing is left to save.
    """
    exact = (steps / ETA**power for power in (3, 2, 1))
    evaluations = {math.ceil(step / eval_every) * eval_every for step in exact}
    return sorted(step for step in evaluations if step < steps)


def bracket(number: int, pruning: str, rung_count: int) -> int:
    """How many of the first rungs a trial skips: 0 under halving; under Hyperband it varies from trial to trial.

    Hyperband hedges against metrics that mislead early on: brackets that compare later get fewer trials, so that each
    bracket costs about as many steps (its paper, algorithm 1: n = ceil((s_max + 1) eta^s / (s + 1))).

    Args:
        number: of the trial.
        pruning: "halving" or "hyperband".
        rung_count: how many rungs there are.
    """
    if pruning == "halving":
        return 0
    weights = [ETA**s / (s + 1) for s in range(rung_count, -1, -1)]
    # multiples of the golden ratio fill [0, 1) evenly, however the trials are batched
    position = (number * _GOLDEN) % 1.0 * sum(weights)
    for skipped, weight in enumerate(weights):
        if position < weight:
            return skipped
        position -= weight
    return rung_count


def outside_best_third(scores: Mapping[int, float]) -> set[int]:
    """Numbers of the trials that are worse than the best third.

    All trials of a batch reach a rung at the same moment, so they are ranked together; deciding on one trial after
    another would favour those decided on first. Equal scores stay together: small validation sets make many of them.

    Args:
        scores: by trial number, higher is better.
    """
    ranked = sorted(scores.values(), reverse=True)
    threshold = ranked[math.ceil(len(ranked) / ETA) - 1]
    return {number for number, score in scores.items() if score < threshold}


def check_pruning(pruning: str, metrics: tuple[str, ...], steps_searched: bool) -> None:
    """Refuse pruning that cannot compare the trials.

    Raises:
        InputError: an unknown kind, several metrics, a metric that evaluations do not have, or a searched length.
    """
    if pruning not in PRUNINGS:
        raise one_of("pruning", pruning, PRUNINGS)
    if pruning == "none":
        return
    if len(metrics) > 1:
        raise InputError(f"pruning needs a single metric, got {', '.join(metrics)}; leave pruning at none")
    if metrics[0] not in ("accuracy", "balanced_accuracy"):
        raise InputError(f"pruning judges by accuracy or balanced_accuracy, got metric {metrics[0]}; leave it at none")
    if steps_searched:
        raise InputError("pruning compares trials at equal steps; fix steps and eval_every in the space, or leave it")
