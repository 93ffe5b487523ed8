"""Multinomial logistic regressions of T trials over the same rows, fitted to their minimum together.

Trials differ in weights of rows, class offsets and penalty. Their class vectors are one matrix, so that all logits are
one product of (T K, D) with (D, N), and all gradients one of (T K, N) with (N, D). The solver is L-BFGS (Liu and
Nocedal 1989), preconditioned in the rows' principal axes; of Newton's method with conjugate gradients, the number of
products was larger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from ulfine_fast.ops.prototypes import normalize

AXES_ROWS = 1 << 14
"""So many evenly spaced rows are enough for :func:`principal_axes`."""

TOLERANCE = 1e-7
MOST_STEPS = 3000

# pairs of steps and gradients that make up the inverse Hessian
_MEMORY = 10
# sufficient decrease and curvature of the line search; decrease that rounding hides
_DECREASE, _CURVATURE, _ROUNDING = 1e-4, 0.9, 1e-7
_MOST_TRIES = 20
# mean loss at which separable rows without a penalty are fitted well enough
_SEPARATED_LOSS = 1e-3
# values of a block's logits: so many fit in a processor's cache, or keep a GPU busy
_VALUES, _VALUES_GPU = 1 << 19, 1 << 27
# smallest curvature of a direction, as a fraction of the largest
_LEAST_CURVATURE = 1e-6
# stages in a decade of penalties, the most stages of a path, and how many solutions a start is extrapolated from
_STAGES, _MOST_STAGES, _SOLUTIONS = 4, 48, 3
_FIRST = 0.03
# penalties so close, in stages, are one
_SAME_STAGE = 1e-5
# of a class, in the first start
_LEAST_FREQUENCY = 1e-6


class Stop(IntEnum):
    """Why a trial stopped.

    Attributes:
        CONVERGED: its gradient is small.
        ROUNDING: no step along the search direction lowers the loss any more, by the precision of the numbers.
        STEPS: it made the most steps allowed.
        SEPARABLE: it has no penalty and all rows are right by a hyperplane: the loss has no minimum, and only falls
            further as the weights grow.
    """

    CONVERGED = 0
    ROUNDING = 1
    STEPS = 2
    SEPARABLE = 3


@dataclass(frozen=True)
class Axes:
    """A rotation of features in which their coordinates are nearly uncorrelated.

    Attributes:
        mean: (D,).
        directions: orthonormal columns (D, D).
    """

    mean: Tensor
    directions: Tensor


@dataclass(frozen=True)
class LogisticFit:
    """Heads of T trials at the end of a fit.

    Attributes:
        weight: class vectors (T, K, D); of length one for cosine heads.
        bias: (T, K); zero for cosine heads. A class without rows that is left out has the logarithm of 1e-8 below the
            mean log-sum-exp of the trial's rows.
        objective: weighted sum of the rows' losses and the penalty, float64 (T,).
        steps: L-BFGS steps (T,).
        stop: why it stopped, values of :class:`Stop` (T,).
    """

    weight: Tensor
    bias: Tensor
    objective: Tensor
    steps: Tensor
    stop: Tensor


def principal_axes(features: Tensor) -> Axes:
    """Mean and principal axes of features (n, D).

    A fit has the same minimum in any axes; these make it take fewer steps.
    """
    sample = features.double()
    mean = sample.mean(0)
    centred = sample - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return Axes(mean.to(features.dtype), directions.to(features.dtype))


def fit_affine(
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    ridge: Tensor,
    *,
    offsets: Tensor | None = None,
    axes: Axes | None = None,
    classes: int | None = None,
    tolerance: float = TOLERANCE,
    most_steps: int = MOST_STEPS,
) -> LogisticFit:
    """Minimise sum_n w_n CE(W x_n + b + o, y_n) + ridge / 2 |W|^2 for each trial.

    With weights of one and offsets of zero this is scikit-learn's `LogisticRegression` with C = 1 / ridge, for K > 2.
    For K = 2 scikit-learn has one vector, the difference of ours, and the same minimum at C = 2 / ridge.

    Args:
        rows: features (N, D), shared by all trials; float32 or float64.
        labels: their classes (N,).
        weights: weight of each row in each trial (T, N); 0 leaves it out. Each trial has a row of positive weight.
        ridge: at least 0 (T,).
        offsets: added to the logits of training (T, K), such as tau log pi for logit adjustment (arXiv 2007.07314);
            minus infinity leaves a class without rows out. By default, 0, and minus infinity for these.
        axes: see :func:`principal_axes`; by default those of `rows`. Trials that are fitted in several calls take the
            same number of steps where the axes are the same.
        classes: K; by default the number of offsets, or the largest label + 1.
        tolerance: a trial stops when its gradient, in the norm of the inverse Hessian, promises no larger decrease
            than this fraction of its loss.
        most_steps: of L-BFGS.
    """
    count = classes or (int(labels.max()) + 1 if offsets is None else offsets.shape[1])
    frequency = _frequency(labels, weights, count)  # (T, K)
    if offsets is None:
        offsets = torch.zeros_like(frequency).masked_fill(frequency == 0, -torch.inf)
    axes = axes or principal_axes(rows)
    ones = rows.new_ones(len(rows), 1)
    total = weights.sum(1)  # (T,)
    penalty = (ridge / total).unsqueeze(1).repeat(1, rows.shape[1] + 1)
    penalty[:, -1] = 0  # the bias is free
    problem = _Problem(
        rows=torch.cat([(rows - axes.mean) @ axes.directions, ones], 1),  # (N, D + 1)
        labels=labels,
        weights=weights / total.unsqueeze(1),
        offsets=offsets,
        penalty=penalty,
    )
    solution = _follow_paths(problem, paths(weights, offsets), ridge, total, frequency, tolerance, most_steps)

    # back to the features' own axes
    weight = solution.parameters[..., :-1] @ axes.directions.T
    bias = solution.parameters[..., -1] - weight @ axes.mean
    left_out = offsets.isinf()
    if bool(left_out.any()):
        weight = weight.masked_fill(left_out.unsqueeze(-1), 0.0)
        lowest = torch.stack(
            [
                (problem.weights[t] * torch.logsumexp((rows @ weight[t].T + bias[t])[:, ~left_out[t]], 1)).sum()
                for t in range(len(weight))
            ]
        )
        bias = torch.where(left_out, lowest.unsqueeze(1) + torch.log(lowest.new_tensor(1e-8)), bias)
    return LogisticFit(weight, bias, solution.loss * total.double(), solution.steps, solution.stop)


def fit_cosine(
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    ridge: Tensor,
    start: Tensor,
    scale: Tensor,
    *,
    offsets: Tensor | None = None,
    axes: Axes | None = None,
    tolerance: float = TOLERANCE,
    most_steps: int = MOST_STEPS,
) -> LogisticFit:
    """Minimise sum_n w_n CE(sigma cos(x_n, v_k) + o, y_n) + ridge sum_k (1 - cos(v_k, start_k)) for each trial.

    The cosine ignores a vector's length, and so does the penalty, which pulls the directions to where they start. It is
    not convex; a trial converges to the minimum next to its start.

    Args:
        rows: unit features (N, D), shared by all trials; float32 or float64.
        labels: their classes (N,).
        weights: weight of each row in each trial (T, N); 0 leaves it out. Each trial has a row of positive weight.
        ridge: at least 0 (T,).
        start: class vectors (T, K, D).
        scale: sigma (T,).
        offsets: added to the logits of training (T, K), finite; 0 by default.
        axes: as for :func:`fit_affine`.
        tolerance: as for :func:`fit_affine`.
        most_steps: of L-BFGS.
    """
    axes = axes or principal_axes(rows)
    total = weights.sum(1)
    anchors = normalize(start) @ axes.directions
    problem = _Problem(
        rows=rows @ axes.directions,
        labels=labels,
        weights=weights / total.unsqueeze(1),
        offsets=start.new_zeros(start.shape[:2]) if offsets is None else offsets,
        penalty=(ridge / total).unsqueeze(1).expand(-1, rows.shape[1]),
        scale=scale,
        anchors=anchors,
    )
    frequency = _frequency(labels, weights, start.shape[1])
    curvature = problem.curvature(frequency)
    solution = _minimise(problem, anchors.clone(), curvature, tolerance, most_steps)
    weight = normalize(solution.parameters @ axes.directions.T)
    objective = solution.loss * total.double()
    return LogisticFit(weight, weight.new_zeros(weight.shape[:2]), objective, solution.steps, solution.stop)


def _frequency(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """Fraction of each trial's weight in each class (T, K)."""
    sums = weights.new_zeros(len(weights), classes).index_add_(1, labels, weights)
    return sums / weights.sum(1, keepdim=True)


@dataclass(frozen=True)
class _Problem:
    """The mean losses of T trials and their gradients.

    Attributes:
        rows: (N, P), shared.
        labels: (N,), shared.
        weights: (T, N), of sum one.
        offsets: (T, K).
        penalty: of each coordinate of a class vector (T, P).
        scale: sigma (T,) of cosine heads; None for heads whose logits are the products.
        anchors: unit vectors (T, K, P) that cosine heads are pulled to.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor
    offsets: Tensor
    penalty: Tensor
    scale: Tensor | None = None
    anchors: Tensor | None = None

    def part(self, index: Tensor) -> _Problem:
        """The trials at some positions alone."""
        return replace(
            self,
            weights=self.weights[index],
            offsets=self.offsets[index],
            penalty=self.penalty[index],
            scale=None if self.scale is None else self.scale[index],
            anchors=None if self.anchors is None else self.anchors[index],
        )

    def products(self, vectors: Tensor) -> Tensor:
        """Products (T, K, N) of class vectors (T, K, P) and rows."""
        return (vectors.flatten(0, 1) @ self.rows.T).view(*vectors.shape[:2], -1)

    def curvature(self, frequency: Tensor) -> Tensor:
        """Diagonal (T, K, P) of the Hessian where each row's probabilities are the class frequencies (T, K)."""
        squares = self.weights @ self.rows.square()  # (T, P)
        spread = (frequency * (1 - frequency)).unsqueeze(-1)  # (T, K, 1)
        if self.scale is not None:
            spread = spread * self.scale.square().view(-1, 1, 1)
        return self._penalised(spread * squares.unsqueeze(1))

    def curvature_at(self, parameters: Tensor) -> Tensor:
        """Diagonal (T, K, P) of the Hessian of affine heads with some class vectors (T, K, P)."""
        probabilities = torch.softmax(self.products(parameters) + self.offsets.unsqueeze(-1), 1)  # (T, K, N)
        spread = probabilities * (1 - probabilities) * self.weights.unsqueeze(1)
        return self._penalised((spread.flatten(0, 1) @ self.rows.square()).view_as(parameters))

    def _penalised(self, diagonal: Tensor) -> Tensor:
        """Diagonal (T, K, P) of the losses' Hessian with that of the penalty, away from zero."""
        diagonal = diagonal + self.penalty.unsqueeze(1)
        return torch.maximum(diagonal, _LEAST_CURVATURE * diagonal.amax((1, 2), keepdim=True))

    def evaluate(self, index: Tensor, parameters: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, float64 (t,), and gradient (t, K, P) of the trials at some positions.

        Args:
            index: positions (t,).
            parameters: class vectors of these trials (t, K, P).
            products: their products with the rows (t, K, N), overwritten.
        """
        loss = torch.empty(len(index), dtype=torch.float64, device=products.device)
        gradient = torch.empty_like(parameters)
        length = parameters.norm(dim=-1, keepdim=True)  # (t, K, 1)
        labels = self.labels.view(1, 1, -1)
        values = _VALUES_GPU if products.is_cuda else _VALUES
        together = max(1, values // products[0].numel())
        for first in range(0, len(index), together):
            block = slice(first, min(first + together, len(index)))
            trials = index[block]
            logits = products[block]  # (b, K, N)
            if self.scale is not None:
                factor = self.scale[trials].view(-1, 1, 1) / length[block]
                logits *= factor
            logits += self.offsets[trials].unsqueeze(-1)
            logits -= logits.amax(1, keepdim=True)
            own = labels.expand(len(trials), -1, -1)
            right = logits.gather(1, own).squeeze(1)  # (b, N)
            total = logits.exp_().sum(1)
            weights = self.weights[trials]
            # rows of a class that a trial leaves out have no weight in it, and an infinite loss
            losses = (total.log() - right).masked_fill_(weights == 0, 0.0)
            loss[block] = (weights * losses).double().sum(1)
            # the gradient of the logits
            logits *= (weights / total).unsqueeze(1)
            logits.scatter_add_(1, own, -weights.unsqueeze(1))
            if self.scale is not None:
                logits *= factor
            torch.mm(logits.flatten(0, 1), self.rows, out=gradient[block].flatten(0, 1))

        penalty = self.penalty[index].unsqueeze(1)
        if self.anchors is None:
            loss += 0.5 * (penalty * parameters.square()).double().sum((1, 2))
            return loss, gradient + penalty * parameters
        unit, anchors = parameters / length, self.anchors[index]
        loss += (penalty[..., :1] * (1 - (unit * anchors).sum(-1, keepdim=True))).double().sum((1, 2))
        gradient -= penalty * anchors / length
        return loss, gradient - (gradient * unit).sum(-1, keepdim=True) * unit

    def separated(self, products: Tensor) -> Tensor:
        """Whether the class vectors have all rows of each trial right, bool (T,), by products (T, K, N)."""
        own = self.labels.view(1, 1, -1).expand(len(products), -1, -1)
        # a class that is left out cannot be wrong
        others = products.masked_fill(self.offsets.isinf().unsqueeze(-1), -torch.inf).scatter(1, own, -torch.inf)
        right = products.gather(1, own).squeeze(1) > others.amax(1)
        return (right | (self.weights == 0)).all(1)


@dataclass
class _Solution:
    """Where trials stopped: parameters (T, K, P), loss float64 (T,), steps (T,) and the reason (T,)."""

    parameters: Tensor
    loss: Tensor
    steps: Tensor
    stop: Tensor

    @classmethod
    def empty(cls, parameters: Tensor) -> _Solution:
        """Of trials that are not solved yet, from a tensor like their parameters."""
        loss = torch.zeros(len(parameters), dtype=torch.float64, device=parameters.device)
        steps = torch.zeros(len(parameters), dtype=torch.int64, device=parameters.device)
        return cls(torch.zeros_like(parameters), loss, steps, torch.zeros_like(steps))

    def part(self, index: slice) -> _Solution:
        """Some trials alone."""
        return _Solution(self.parameters[index], self.loss[index], self.steps[index], self.stop[index])

    def put(self, index: Tensor, part: _Solution) -> None:
        """Set the solutions of the trials at some positions."""
        self.parameters[index], self.loss[index] = part.parameters, part.loss
        self.steps[index], self.stop[index] = part.steps, part.stop


def paths(weights: Tensor, offsets: Tensor) -> Tensor:
    """Number (T,) of each trial's path: trials of equal weights (T, N) and offsets (T, K) are on the same one."""
    return torch.cat([weights, offsets], 1).unique(dim=0, return_inverse=True)[1]


def _follow_paths(
    problem: _Problem,
    path: Tensor,
    ridge: Tensor,
    total: Tensor,
    frequency: Tensor,
    tolerance: float,
    most_steps: int,
) -> _Solution:
    """Minimise from strong penalties to weak ones, each trial from where the solutions of stronger ones lead.

    The solution is a smooth curve over the logarithm of the penalty. Stages are fixed penalties, a quarter of a decade
    apart. A stage fits the trials since the last one, and its own penalty where weaker ones follow, all paths side by
    side. Starts are extrapolated from the solutions at earlier stages alone: a trial has the same start whichever
    others are on its path.

    Args:
        problem: of all trials, affine.
        path: number of each trial's path (T,); see :func:`paths`.
        ridge: penalty of each trial (T,), at least 0.
        total: sum of each trial's weights (T,).
        frequency: see :func:`_frequency`.
        tolerance: see :func:`fit_affine`.
        most_steps: of each fit.
    """
    trials = torch.arange(len(ridge), device=ridge.device)
    leaders = trials.new_full((int(path.max()) + 1,), len(trials)).scatter_reduce(0, path, trials, "amin")  # (C,)

    # a path starts where the penalty's curvature is that of the losses; trials without a penalty are not on the way
    losses = replace(problem.part(leaders), penalty=torch.zeros_like(problem.penalty[leaders]))
    strongest = losses.curvature(frequency[leaders]).amax((1, 2)) * total[leaders]
    first = _stage(_FIRST * strongest).floor()  # (C,)
    position = _stage(ridge)  # (T,)
    stage_of = position.ceil().clamp(max=(first + _MOST_STAGES)[path])
    stage_of = torch.where(ridge > 0, torch.maximum(stage_of, first[path]), first[path])
    last = first.scatter_reduce(0, path, stage_of, "amax")

    # without weights, the bias makes the probabilities the class frequencies
    recent = problem.rows.new_zeros(len(first), _SOLUTIONS, frequency.shape[1], problem.rows.shape[1])
    level = frequency.clamp(min=_LEAST_FREQUENCY).log() - problem.offsets
    recent[:, 0, :, -1] = level.masked_fill(problem.offsets.isinf(), 0.0)[leaders]
    solution = _Solution.empty(recent.new_empty(len(trials), *recent.shape[2:]))
    for stage in range(int(first.min()), int(last.max()) + 1):
        # who is fitted, with which penalty
        own = (stage_of == stage).nonzero().squeeze(1)
        further = (first <= stage) & (stage < last)  # (C,)
        missing = further.clone()
        missing[path[own[position[own] == stage]]] = False
        members = torch.cat([own, leaders[missing]])
        at = torch.cat([position[own], position.new_full((len(members) - len(own),), stage)])
        penalty = torch.cat([ridge[own], ridge.new_full((len(members) - len(own),), 10 ** (-stage / _STAGES))])
        part = problem.part(members)
        part = replace(part, penalty=part.penalty.new_zeros(part.penalty.shape))
        part.penalty[:, :-1] = (penalty / total[members]).unsqueeze(1)

        # the polynomial through the last solutions
        beyond = (at - (stage - 1)).clamp(0, 1)  # stages from the last one
        zero, one = torch.zeros_like(beyond), torch.ones_like(beyond)
        polynomials = torch.stack(
            [
                torch.stack([one, zero, zero]),
                torch.stack([1 + beyond, -beyond, zero]),
                torch.stack([(1 + beyond) * (2 + beyond) / 2, -beyond * (2 + beyond), beyond * (1 + beyond) / 2]),
            ]
        )  # (3, 3, t)
        known = (stage - first[path[members]]).clamp(1, _SOLUTIONS).long()
        factors = polynomials[known - 1, :, torch.arange(len(members), device=known.device)]  # (t, 3)
        start = torch.einsum("ts,tskp->tkp", factors.to(recent), recent[path[members]])

        fit = _minimise(part, start, part.curvature_at(start), tolerance, most_steps)
        solution.put(own, fit.part(slice(0, len(own))))
        passed = (at == stage) & further[path[members]]
        to = path[members[passed]]
        recent[to] = torch.cat([fit.parameters[passed].unsqueeze(1), recent[to, :-1]], 1)
    return solution


def _stage(ridge: Tensor) -> Tensor:
    """Position of a penalty among the stages, float64: rising as it falls, whole at a stage, infinite at 0."""
    position = -_STAGES * ridge.double().log10()
    nearest = position.round()
    return torch.where((position - nearest).abs() < _SAME_STAGE, nearest, position)


def _minimise(
    problem: _Problem,
    parameters: Tensor,
    curvature: Tensor,
    tolerance: float,
    most_steps: int,
) -> _Solution:
    """L-BFGS for all trials side by side; trials that have stopped leave the products.

    Args:
        problem: of the trials.
        parameters: where they start (T, K, P).
        curvature: diagonal of the Hessian (T, K, P), by which the first inverse Hessian is made.
        tolerance: see :func:`fit_affine`.
        most_steps: of each trial.
    """
    count = len(parameters)
    device = parameters.device
    solution = _Solution.empty(parameters)
    members = torch.arange(count, device=device)
    running = torch.ones(count, dtype=torch.bool, device=device)
    history = _History([], [], [], torch.ones_like(problem.penalty[:, 0]))
    products = problem.products(parameters)  # (T, K, N)
    loss, gradient = problem.evaluate(members, parameters, products.clone())
    stuck = torch.zeros_like(running)
    unpenalised = (problem.penalty == 0).all(1) if problem.anchors is None else torch.zeros_like(running)
    for step in range(most_steps + 1):
        direction = -history.inverse(gradient, curvature)
        slope = _dot(gradient, direction)

        # trials that stop
        reason = torch.full_like(members, -1)
        if step == most_steps:
            reason.masked_fill_(reason < 0, Stop.STEPS)
        reason[stuck] = Stop.ROUNDING
        # written so that a loss that is not finite stops too
        reason[~(-0.5 * slope.double() > tolerance * loss)] = Stop.CONVERGED
        apart = unpenalised & (loss < _SEPARATED_LOSS)
        if bool(apart.any()):
            apart[apart.clone()] = problem.part(apart).separated(products[apart])
            reason[apart] = Stop.SEPARABLE
        stops = running & (reason >= 0)
        if bool(stops.any()):
            who = members[stops]
            steps = torch.full_like(who, step)
            solution.put(who, _Solution(parameters[stops], loss[stops], steps, reason[stops]))
            running &= ~stops
        left = int(running.sum())
        if not left:
            break
        # copying what is kept costs more than a few idle trials
        if left < 0.9 * len(members):
            kept = running.nonzero().squeeze(1)
            problem, history = problem.part(kept), history.part(kept)
            members, running, unpenalised = members[kept], running[kept], unpenalised[kept]
            parameters, products, curvature = parameters[kept], products[kept], curvature[kept]
            loss, gradient, direction, slope = loss[kept], gradient[kept], direction[kept], slope[kept]

        # a step of each trial by its own line search (weak Wolfe conditions, by bisection)
        along = problem.products(direction)
        before, gradient = gradient, gradient.clone()
        start = loss.clone()
        length = torch.ones_like(slope)
        low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        stuck = torch.zeros_like(running)
        searching = running.nonzero().squeeze(1)
        for _ in range(_MOST_TRIES):
            # mostly all trials search, and nothing is copied
            every = len(searching) == len(members)
            ends = (parameters, direction, products, along)
            here, ahead, now, slopes = ends if every else (tensor[searching] for tensor in ends)
            size = length[searching].view(-1, 1, 1)
            loss[searching], gradient[searching] = problem.evaluate(
                searching, torch.addcmul(here, size, ahead), torch.addcmul(now, size, slopes)
            )
            promised = _DECREASE * (length * slope)[searching].double()
            limit = start[searching] * (1 + _ROUNDING) + promised
            long = ~(loss[searching] <= limit)
            slope_there = _dot(gradient if every else gradient[searching], ahead)
            short = ~long & (slope_there < _CURVATURE * slope[searching])
            wrong = long | short
            if not bool(wrong.any()):
                searching = searching[:0]
                break
            high[searching[long]] = length[searching[long]]
            low[searching[short]] = length[searching[short]]
            searching = searching[wrong]
            middle = 0.5 * (low + high)
            length[searching] = torch.where(high.isinf(), 2.5 * length, middle)[searching]
        # the last try of trials whose search failed is taken back
        stuck[searching] = True
        length = torch.where(stuck | ~running, 0.0, length)
        loss = torch.where(stuck, start, loss)
        gradient = torch.where(stuck.view(-1, 1, 1), before, gradient)

        taken = length.view(-1, 1, 1) * direction
        parameters = parameters + taken
        products.addcmul_(length.view(-1, 1, 1), along)
        history.add(taken, gradient - before, curvature)
    return solution


@dataclass
class _History:
    """The last steps and differences of gradients, of which L-BFGS makes its inverse Hessian.

    Attributes:
        steps: (T, K, P) each.
        changes: of the gradient, (T, K, P) each.
        inverses: 1 / (step . change), (T,) each; 0 where a pair is left out.
        factor: of the inverse curvature (T,).
    """

    steps: list[Tensor]
    changes: list[Tensor]
    inverses: list[Tensor]
    factor: Tensor

    def part(self, index: Tensor) -> _History:
        """The trials at some positions alone."""
        groups = (self.steps, self.changes, self.inverses)
        steps, changes, inverses = ([tensor[index] for tensor in group] for group in groups)
        return _History(steps, changes, inverses, self.factor[index])

    def add(self, step: Tensor, change: Tensor, curvature: Tensor) -> None:
        """Add a pair, and forget the oldest one; a pair without positive curvature is left out."""
        product = _dot(step, change)
        valid = product > 0
        self.steps.append(step)
        self.changes.append(change)
        self.inverses.append(torch.where(valid, 1 / product, 0.0))
        for group in (self.steps, self.changes, self.inverses):
            del group[:-_MEMORY]
        self.factor = torch.where(valid, product / _dot(change, change / curvature), self.factor)

    def inverse(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The inverse Hessian times the gradient (T, K, P), by the two loops of Nocedal (1980)."""
        result = gradient.clone()
        coefficients = []
        pairs = list(zip(self.steps, self.changes, self.inverses, strict=True))
        for step, change, inverse in reversed(pairs):
            coefficients.append((inverse * _dot(step, result)).view(-1, 1, 1))
            result.addcmul_(coefficients[-1], change, value=-1)
        result *= self.factor.view(-1, 1, 1) / curvature
        for (step, change, inverse), coefficient in zip(pairs, reversed(coefficients), strict=True):
            result.addcmul_(coefficient - (inverse * _dot(change, result)).view(-1, 1, 1), step)
        return result


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (T,) of each trial's tensors (T, K, P)."""
    # a batched product of vectors is several times slower on a processor
    return (one * other).flatten(1).sum(1)
