"""What is measured: a data set, its labelled and unlabelled counts, and the shape of the unlabelled part."""

from __future__ import annotations

from dataclasses import dataclass

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import SHAPES, FitConfig

LABELED_FRACTION = 0.5
"""Fraction of each class that keeps its labels where a cell takes the data's own counts and names no fraction."""


@dataclass(frozen=True)
class Protocol:
    """Counts that go with one N1 of a data set.

    Attributes:
        gamma_l: labelled imbalance.
        gamma_u: unlabelled imbalance where the command line gives none.
        m1: unlabelled images of the largest class; None for as many as the data allow.
        uniform: unlabelled images of every class with the shape `uniform`; None likewise.
    """

    gamma_l: float = 100.0
    gamma_u: float = 100.0
    m1: int | None = None
    uniform: int | None = None


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        data: a data set's name, see `benchmarks.data.open_data`.
        n1: labelled images of the largest class; None for the data's own counts.
        shape: class distribution of the unlabelled images; `uniform` ignores gamma_u.
        gamma_l: labelled imbalance; without meaning where n1 is None, and so are m1 and gamma_u.
        m1: unlabelled images of the largest class; None for as many as the data allow.
        gamma_u: unlabelled imbalance.
        labeled_fraction: fraction of each class that keeps its labels, where n1 is None.
    """

    data: str
    n1: int | None
    shape: str
    gamma_l: float
    m1: int | None
    gamma_u: float
    labeled_fraction: float = LABELED_FRACTION

    @property
    def name(self) -> str:
        """The cell as `parse_cell` reads it."""
        return f"{self.data}:{self.counts}:{self.shape}"

    @property
    def counts(self) -> str:
        """N1, or the labelled fraction as a percentage."""
        return f"{100 * self.labeled_fraction:g}%" if self.n1 is None else str(self.n1)

    def config(self, **options: object) -> FitConfig:
        """A trial of this cell with these options.

        Raises:
            InputError: an option that the method does not read, or a value outside its range.
        """
        split = {
            "n1": self.n1,
            "m1": self.m1,
            "gamma_l": self.gamma_l,
            "gamma_u": self.gamma_u,
            "shape": self.shape,
            "labeled_fraction": self.labeled_fraction if self.n1 is None else 1.0,
        }
        return FitConfig.from_dict({**split, **options})


_SUPERCLASSES = {150: Protocol(10, 10, 1000, 250)}
_FASHION_MNIST = {150: Protocol(100, 100, 1000, 250), 50: Protocol(50, 100, 1000, 250)}

_PROTOCOLS = {
    "fashion_mnist": _FASHION_MNIST,
    "fashion_mnist_merged": _FASHION_MNIST,
    "fashion_mnist_random": _FASHION_MNIST,
    "fashion_mnist_open": _FASHION_MNIST,
    "fashion_mnist_wide": _FASHION_MNIST,
    "cifar10": {
        1500: Protocol(100, 100, 3000, 3000),
        500: Protocol(100, 100, 4000, 4000),
        150: Protocol(100, 100, 1000, 250),
    },
    "cifar100": {150: Protocol(10, 10, 300, 300), 50: Protocol(10, 10, 400, 400)},
    "cifar100_permuted": {50: Protocol(10, 10, 200, 200)},
    "cifar100_superclasses": _SUPERCLASSES,
    "cifar100_mixed": _SUPERCLASSES,
    "food101": {150: Protocol(10, 10, 300, 300), 50: Protocol(10, 10, 400, 400)},
    "stl10": {450: Protocol(10, 10), 150: Protocol(10, 10)},
    "mnist": {50: Protocol(50, 50, 250, 150), 15: Protocol(15, 50, 250, 150)},
    "digits": {40: Protocol(20, 20, 90, 60), 10: Protocol(10, 20, 90, 60)},
}


def protocols(data: str) -> dict[int, Protocol]:
    """What goes with each N1 of a data set; empty for a set without a protocol, which takes any N1.

    Counts of CIFAR-10, CIFAR-100 and STL-10 are those of the literature (ACR, arXiv 2305.10714, table 1, and its
    successors); Food-101's follow CIFAR-100's. Those of the other sets, and CIFAR-10 with 150 labels, are ours.
    """
    return _PROTOCOLS.get(data.partition("=")[0], {})


def parse_cell(text: str, gamma_u: float | None = None, m1: int | None = None) -> Cell:
    """Read DATA:N1:SHAPE.

    Args:
        text: such as `fashion_mnist:150:consistent`; without N1 (`tux_paint::natural`) or with a percentage
            (`tux_paint:25%:natural`) the data's own counts are taken and that fraction of each class keeps its labels.
        gamma_u: unlabelled imbalance instead of the protocol's.
        m1: unlabelled images of the largest class instead of the protocol's, for every shape.

    Raises:
        InputError: not three parts, an unknown shape, or an N1 that the data set's protocol does not have.
    """
    # from the right, since a folder's name may hold colons
    parts = text.strip().rsplit(":", 2)
    if len(parts) != 3 or not parts[0]:
        raise InputError(f"a cell is DATA:N1:SHAPE such as fashion_mnist:150:consistent, got {text!r}")
    data, counts, shape = parts
    if shape not in SHAPES:
        raise InputError(f"the shape of {text!r} must be one of {', '.join(SHAPES)}")

    # the data's own counts
    if not counts or counts.endswith("%"):
        if shape != "natural":
            raise InputError(
                f"without N1 the counts are the data's own, shape natural; {data}:{counts}:{shape} wants {shape}"
            )
        return Cell(data, None, shape, 1.0, None, 1.0, _labeled_fraction(data, counts))

    # the protocol's
    known = protocols(data)
    if not counts.isdecimal() or int(counts) < 1:
        raise InputError(f"N1 of {data} must be a whole number above 0, a percentage or empty, got {counts!r}")
    if known and int(counts) not in known:
        raise InputError(f"{data} has the N1 {', '.join(map(str, known))}, got {counts}")
    protocol = known.get(int(counts), Protocol())
    return Cell(
        data=data,
        n1=int(counts),
        shape=shape,
        gamma_l=protocol.gamma_l,
        m1=m1 if m1 is not None else protocol.uniform if shape == "uniform" else protocol.m1,
        gamma_u=protocol.gamma_u if gamma_u is None else gamma_u,
    )


def _labeled_fraction(data: str, percentage: str) -> float:
    """Read such as "25%"; half where it is empty."""
    if not percentage:
        return LABELED_FRACTION
    try:
        fraction = float(percentage[:-1]) / 100
    except ValueError:
        raise InputError(
            f"the labelled fraction of {data} must be a percentage such as 50%, got {percentage!r}"
        ) from None
    if not 0 < fraction < 1:
        raise InputError(f"the labelled fraction of {data} must be between 0% and 100%, got {percentage}")
    return fraction


def parse_cells(text: str, gamma_u: float | None = None, m1: int | None = None) -> list[Cell]:
    """Read cells separated by commas; each once.

    Raises:
        InputError: see `parse_cell`; or no cell at all.
    """
    cells = [parse_cell(part, gamma_u, m1) for part in text.split(",") if part.strip()]
    if not cells:
        raise InputError("name at least one cell, such as fashion_mnist:150:consistent")
    return list(dict.fromkeys(cells))
