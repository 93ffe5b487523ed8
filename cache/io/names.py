"""Refusals of a name that is none of the known ones: each lists them and says which one was likely meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from ulfine_fast.cache.io.errors import InputError

# Names as close as "lable" and "label" look alike.
_CLOSE = 0.6
# A list of more names than these ends in a count: a data set may have thousands of classes.
_LISTED = 50


def one_of(what: str, value: object, known: Iterable[str], otherwise: str = "") -> InputError:
    """The error for a value that must be one of several names.

    Args:
        what: the option or thing that has the value.
        value: what it is.
        known: the legal values, in the order to list them in.
        otherwise: what to do where no name is near.

    Returns:
        Such as "sampler must be one of tpe, random, got 'tpee'; did you mean tpe?".
    """
    names = list(known)
    return InputError(f"{what} must be one of {listed(names)}, got {value!r}{did_you_mean(value, names, otherwise)}")


def did_you_mean(value: object, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """The end of a refusal: "; did you mean ViT-B-16?", or "; " and the other advice where no name is near."""
    near = near_names(str(value), known, most)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; {otherwise}" if otherwise else ""


def near_names(value: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Names that look like a value, the nearest first.

    Capitals, blanks and signs do not count: "vitb16" is near to "ViT-B-16" alone. A name that begins or ends with the
    value, at a sign of its own, is near too: "probe" to "linear_probe".
    """
    by_form: dict[str, list[str]] = {}
    for name in known:
        by_form.setdefault(_form(name), []).append(name)
    form = _form(value)
    if not form:
        return []
    if form in by_form:
        return by_form[form][:most]
    alike = {other: difflib.SequenceMatcher(None, form, other).ratio() for other in by_form}
    close = sorted((other for other in by_form if alike[other] >= _CLOSE), key=lambda other: -alike[other])
    parts = {other for other, names in by_form.items() if any(form in _ends(name) for name in names)}
    forms = [*close, *sorted(parts - set(close), key=len)]
    return [name for other in forms for name in by_form[other]][:most]


def listed(names: Iterable[str]) -> str:
    """Names with commas between them, the last of very many as their count."""
    all_names = list(names)
    if len(all_names) <= _LISTED:
        return ", ".join(all_names)
    return f"{', '.join(all_names[:_LISTED])} and {len(all_names) - _LISTED} more"


def _form(name: str) -> str:
    """What counts of a name when names are compared; the name itself where it has neither letters nor digits."""
    folded = name.casefold().strip()
    return re.sub(r"[\W_]+", "", folded) or folded


def _ends(name: str) -> set[str]:
    """The first and last words of a name."""
    words = [word for word in re.split(r"[\W_]+", name.casefold()) if word]
    return {"".join(part) for n in range(1, len(words)) for part in (words[:n], words[-n:])}
