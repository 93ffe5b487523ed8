"""The Hugging Face Hub: whether it answers, noticed in seconds, and loading what this machine already holds of it."""

from __future__ import annotations

import contextlib
import http.client
import logging
import ssl
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from ulfine_fast.cache.io.errors import InputError, one_line

SECONDS = 4.0
"""How long an answer is waited for. The libraries try again for a minute, which would help only a hub that is slow."""

_Loaded = TypeVar("_Loaded")


def why_no_hub(address: str | None = None, seconds: float = SECONDS) -> str | None:
    """Why a hub cannot be asked, None where it answers; proxies of the environment are used.

    Args:
        address: of the server; by default HF_ENDPOINT or the Hub's.
        seconds: how long to wait, for the name of the server too.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    server = (address or constants.ENDPOINT).rstrip("/")
    # a thread, because no time limit covers the look-up of a name; a daemon, because it may never end
    reasons: list[str | None] = []
    thread = threading.Thread(target=lambda: reasons.append(_ask(server, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0] if reasons else _no_answer(server, seconds)


def load_from_hub(load: Callable[[], _Loaded], what: str, fix: str) -> _Loaded:
    """What `load` returns, from files on this machine where they are here, else from the hub.

    The libraries that load log nothing meanwhile; what they have to say is in their errors.

    Args:
        load: loads something with a library of Hugging Face; it is called a second time where its files are not here.
        what: that something, for messages: "the weights of ViT-B-16 (openai)".
        fix: what to do where no hub can be reached.

    Raises:
        InputError: no hub answers, or it refuses, or what it sent does not load.
    """
    with _quiet():
        # whatever the loaders raise, the hub's, pickle's or their own
        with contextlib.suppress(Exception), local_files_only():
            return load()
        reason = why_no_hub()
        if reason is not None:
            raise InputError(f"{what} are not on this machine and no model hub could be reached ({reason}); {fix}")
        try:
            return load()
        except Exception as error:
            raise InputError(f"{what} cannot be loaded from the hub ({one_line(error)}); check the name") from error


@contextlib.contextmanager
def local_files_only() -> Iterator[None]:
    """A context in which libraries of Hugging Face look at files on this machine alone, as with HF_HUB_OFFLINE."""
    from huggingface_hub import constants, utils

    # before version 1 a connection keeps the setting of its first use
    forget = getattr(utils, "reset_sessions", lambda: None)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    forget()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        forget()


def _ask(server: str, seconds: float) -> str | None:
    try:
        request = urllib.request.Request(server, method="HEAD", headers={"User-Agent": "ulfine-fast"})
        # an opener of its own: the shared one keeps the proxies of its first use
        urllib.request.build_opener().open(request, timeout=seconds).close()
    # an answer, be it a refusal
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # the libraries bring certificates of their own
        if isinstance(reason, ssl.SSLCertVerificationError):
            return None
        if isinstance(reason, TimeoutError):
            return _no_answer(server, seconds)
        return f"{server}: {one_line(reason) if isinstance(reason, BaseException) else reason}"
    return None


def _no_answer(server: str, seconds: float) -> str:
    return f"{server} does not answer within {seconds:g} s"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without log records and warnings of libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
