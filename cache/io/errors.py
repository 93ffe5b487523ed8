"""Errors that a user can cause and fix; commands print their one sentence and exit with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message is one sentence with the offending value and the fix."""


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
        fix: str = "use the same value, another folder, or --mode overwrite",
    ) -> None:
        """`fix` is what the user can do, the end of the sentence."""
        self.field = field
        self.found = found
        self.wanted = wanted
        super().__init__(f"this cache was made with {field} = {found!r}, the request says {wanted!r}; {fix}")

    def with_fix(self, fix: str) -> CacheMismatch:
        """The same mismatch with other advice."""
        return CacheMismatch(self.field, self.found, self.wanted, fix)


def one_line(error: BaseException) -> str:
    """The start of an error's text, fit for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
