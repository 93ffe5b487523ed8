"""Errors a user can cause and mend; commands print their one sentence and exit with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message is one sentence with the offending value and the way out."""


class CacheMismatch(InputError):
    """A cache was made with other settings than the ones asked for.

    Attributes:
        field: dotted name of the first manifest field that differs.
        found: its value in the cache.
        wanted: its value in the request.
    """

    def __init__(
        self,
        field: str,
        found: object,
        wanted: object,
        way_out: str = "use the same value, another folder, or --mode overwrite",
    ) -> None:
        self.field, self.found, self.wanted = field, found, wanted
        super().__init__(f"this cache was made with {field} = {found!r}, the request says {wanted!r}; {way_out}")
