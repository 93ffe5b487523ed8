"""Export folders on the Hugging Face Hub, or on a server that speaks as it does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ulfine_fast.cache.io.errors import InputError

SCHEME = "hf://"
CARD = "README.md"
_Found = TypeVar("_Found")


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Sends an export folder to a model repository, in one commit; the repository is made where there is none.

    Args:
        folder: what `export` wrote; its model, config.json and card go, and nothing else that lies there.
        repo: "owner/name", with or without "hf://".
        private: whether a repository that is made now is hidden from others.
        message: of the commit.
        token: that may write there; by default that of `hf auth login` or HF_TOKEN.
        endpoint: another server's address; by default HF_ENDPOINT or the Hub's.

    Returns:
        The commit's address.

    Raises:
        InputError: no export folder, no such name, no right to write, no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from ulfine_fast.exports.load import read_config
    from ulfine_fast.exports.write import CONFIG

    told = read_config(Path(folder))
    files = [Path(folder) / name for name in (CARD, CONFIG, told["file"]) if (Path(folder) / name).is_file()]
    api = HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token)
    name = repo.removeprefix(SCHEME)

    def send() -> str:
        made = api.create_repo(name, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
        said = message or f"{told['method']} over {len(told['class_names'])} classes, as {told['to']}"
        return api.create_commit(made.repo_id, operations, commit_message=said).commit_url

    return _or_one_sentence(send, name)


def pull(address: str, *, token: str | None = None, endpoint: str | None = None) -> Path:
    """Downloads a model repository's export folder, or finds it where an earlier call left it.

    Args:
        address: "hf://owner/name", or "hf://owner/name@revision" for a branch, tag or commit.
        token: as for :func:`push`.
        endpoint: likewise.

    Returns:
        The folder, in the Hub's own cache.

    Raises:
        InputError: no such repository or revision, no right to read, no network.
    """
    from huggingface_hub import snapshot_download

    from ulfine_fast.exports.write import CONFIG, FORMATS

    name, _, revision = address.removeprefix(SCHEME).partition("@")
    wanted = [CARD, CONFIG, FORMATS["safetensors"], FORMATS["onnx"]]

    # the client reads HF_ENDPOINT once, when it is imported
    server = endpoint or os.environ.get("HF_ENDPOINT")

    def get() -> Path:
        found = snapshot_download(name, revision=revision or None, allow_patterns=wanted, token=token, endpoint=server)
        return Path(found)

    return _or_one_sentence(get, name)


def _or_one_sentence(call: Callable[[], _Found], name: str) -> _Found:
    """What the call gives, or why the server did not, in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return call()
    except HFValidationError as error:
        raise InputError(f"a repository is named owner/name, got {name!r}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise InputError(
            f"the server refused {name} ({status}); check the name and the token (hf auth login, or HF_TOKEN)"
        ) from error
    # a lost connection is an error of the client's own library, another one with each major version
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{name} cannot be reached ({reason}); check the network and HF_ENDPOINT") from error
