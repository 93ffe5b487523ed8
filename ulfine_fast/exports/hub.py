"""Export folders on the Hugging Face Hub, or on a server with the same interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.hub import why_no_hub
from ulfine_fast.exports.config import CARD, CONFIG, FORMATS, check_model_file, read_config

SCHEME = "hf://"


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Sends an export folder to a model repository, in one commit; a repository that does not exist is created.

    Args:
        folder: what `export` wrote; its model, config.json and card are sent, and no other file in it.
        repo: "owner/name", with or without "hf://".
        private: whether a repository that is created is hidden from others.
        message: of the commit.
        token: one that may write there; by default that of `hf auth login` or HF_TOKEN.
        endpoint: another server's address; by default HF_ENDPOINT or the Hub's.

    Returns:
        The commit's address.

    Raises:
        InputError: no export folder, no such name, no right to write, no network.
    """
    # slow to import, and most exports never reach a server
    from huggingface_hub import CommitOperationAdd, HfApi

    config = read_config(Path(folder))
    check_model_file(Path(folder), config)
    # a student may have a graph beside its model
    names = dict.fromkeys((CARD, CONFIG, config["file"], *([FORMATS["onnx"]] if "student" in config else [])))
    files = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    message = message or f"{config['method']} over {len(config['class_names'])} classes, as {config['to']}"
    server = endpoint or os.environ.get("HF_ENDPOINT")
    api = HfApi(endpoint=server, token=token)
    name = repo.removeprefix(SCHEME)
    # the client would try again for a minute
    reason = why_no_hub(server)
    if reason is not None:
        raise InputError(f"{name} cannot be reached ({reason}); check the network and HF_ENDPOINT")
    with _server_errors(name):
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        return api.create_commit(repo_id, operations, commit_message=message).commit_url


def pull(address: str, *, token: str | None = None, endpoint: str | None = None) -> Path:
    """Downloads a model repository's export folder; what an earlier call downloaded is used again.

    Args:
        address: "hf://owner/name", or "hf://owner/name@revision" for a branch, tag or commit.
        token: as for :func:`push`.
        endpoint: likewise.

    Returns:
        The folder, in the Hub's own cache.

    Raises:
        InputError: no such repository or revision, no right to read, no network.
    """
    # slow to import, and most exports never reach a server
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix(SCHEME).partition("@")
    files = [CARD, CONFIG, FORMATS["safetensors"], FORMATS["onnx"]]
    # the client reads HF_ENDPOINT once, when it is imported
    server = endpoint or os.environ.get("HF_ENDPOINT")
    with _server_errors(name):
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=files, token=token, endpoint=server)
        )


@contextmanager
def _server_errors(name: str) -> Iterator[None]:
    """Turns what the client raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
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
