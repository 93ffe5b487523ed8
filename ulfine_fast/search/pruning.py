"""Which trials are given up early: successive halving and Hyperband over trials that train side by side.

SOURCE: Jamieson and Talwalkar, arXiv 1502.07943 (successive halving); Li et al., arXiv 1603.06560 (Hyperband).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ulfine_fast.cache.io.errors import InputError

PRUNINGS = ("none", "halving", "hyperband")
ETA = 3
"""One in ETA trials goes on at a rung (the value of the Hyperband paper)."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def rungs(steps: int, eval_every: int) -> list[int]:
    """Steps at which trials are judged: steps / 27, / 9 and / 3, each at the first evaluation from there on.

    Args:
        steps: of a whole trial, at least 1.
        eval_every: steps between evaluations, at least 1.

    Returns:
        Ascending, without the last evaluation, where nothing is left to save.
    """
    wanted = (steps / ETA**power for power in (3, 2, 1))
    found = {math.ceil(step / eval_every) * eval_every for step in wanted}
    return sorted(step for step in found if step < steps)


def bracket(number: int, pruning: str, rungs_there: int) -> int:
    """How many of the first rungs a trial skips: 0 under halving; under Hyperband spread over the trials.

    Hyperband hedges against figures that are misleading early: brackets that judge later get fewer trials, so that
    each bracket costs about as many steps (its paper, algorithm 1: n = ceil((s_max + 1) eta^s / (s + 1))).

    Args:
        number: of the trial.
        pruning: "halving" or "hyperband".
        rungs_there: how many rungs there are.
    """
    if pruning == "halving":
        return 0
    weights = [ETA**s / (s + 1) for s in range(rungs_there, -1, -1)]
    # multiples of the golden ratio fill [0, 1) evenly, whichever trials happen to share a pass
    place = (number * _GOLDEN) % 1.0 * sum(weights)
    for skipped, weight in enumerate(weights):
        if place < weight:
            return skipped
        place -= weight
    return rungs_there


def hopeless(scores: Mapping[int, float]) -> set[int]:
    """Trials that are worse than the best third.

    All trials of a pass reach a rung in the same instant, so they are ranked at once; asking after them one by one
    would favour whichever is asked first. Equals stay together: small validation sets make many of them.

    Args:
        scores: by trial number, more is better.
    """
    ranked = sorted(scores.values(), reverse=True)
    last = ranked[math.ceil(len(ranked) / ETA) - 1]
    return {number for number, score in scores.items() if score < last}


def check_pruning(pruning: str, metrics: tuple[str, ...], steps_searched: bool) -> None:
    """Refuse pruning that cannot be judged.

    Raises:
        InputError: an unknown kind, several metrics, a metric that evaluations do not have, or a searched length.
    """
    if pruning not in PRUNINGS:
        raise InputError(f"pruning must be one of {', '.join(PRUNINGS)}, got {pruning!r}")
    if pruning == "none":
        return
    if len(metrics) > 1:
        raise InputError(f"pruning needs a single metric, got {', '.join(metrics)}; leave pruning at none")
    if metrics[0] not in ("accuracy", "balanced_accuracy"):
        raise InputError(f"pruning judges by accuracy or balanced_accuracy, got metric {metrics[0]}; leave it at none")
    if steps_searched:
        raise InputError("pruning compares trials at equal steps; fix steps and eval_every in the space, or leave it")
