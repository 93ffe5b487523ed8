"""Methods by name."""

from __future__ import annotations

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.base import Method


def method_of(config: FitConfig) -> Method:
    """The method a config names.

    Raises:
        InputError: a method that takes no ensemble of heads is given one.
    """
    # every method imports this module
    from ulfine_fast.methods.catalog import CLASSES
    from ulfine_fast.related.channel_ensemble import method as channel_ensemble

    if not config.ensemble_heads:
        return CLASSES[config.method]()
    if config.method not in channel_ensemble.CLASSES:
        takers = ", ".join(channel_ensemble.CLASSES)
        raise InputError(
            f"method {config.method} takes no ensemble and ensemble_heads is {config.ensemble_heads}; set it to 0, or "
            f"take one of {takers}"
        )
    return channel_ensemble.CLASSES[config.method]()
