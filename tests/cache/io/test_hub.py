"""A hub that answers, refuses, or never answers; servers of this machine stand for it."""

from __future__ import annotations

import logging
import socket
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, hf_hub_download

from tests.cache.samples import write_images
from tests.cli.program import refused
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.hub import load_from_hub, local_files_only, why_no_hub


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing():
    """An address that no server listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def answering():
    """The address of a server that answers 404 to everything, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_whether_a_hub_answers(silent, refusing, answering):
    assert why_no_hub(answering[0]) is None
    assert why_no_hub(silent, seconds=0.2) == f"{silent} does not answer within 0.2 s"
    assert why_no_hub(refusing).startswith(f"{refusing}: ")
    assert why_no_hub("nonsense://host").startswith("nonsense://host: ")


def test_a_proxy_of_the_environment_is_asked(monkeypatch, refusing, answering):
    monkeypatch.setenv("http_proxy", answering[0])
    assert why_no_hub("http://hub.invalid") is None
    assert answering[1] == ["http://hub.invalid"]
    monkeypatch.setenv("http_proxy", refusing)
    assert why_no_hub("http://hub.invalid") is not None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert why_no_hub(answering[0]) is None


def test_the_address_is_that_of_the_client(monkeypatch, answering):
    monkeypatch.setattr(constants, "ENDPOINT", f"{answering[0]}/mirror")
    assert why_no_hub() is None
    assert answering[1] == ["/mirror"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_no_hub() == "HF_HUB_OFFLINE is set"


def test_files_of_this_machine_are_loaded_without_a_hub(monkeypatch, tmp_path, refusing):
    """As the client stores them; no server is asked."""
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    revision = "0" * 40
    folder = tmp_path / "hub" / "models--ada--shoes"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    path = load_from_hub(lambda: hf_hub_download("ada/shoes", "config.json", cache_dir=tmp_path / "hub"), "it", "wait")
    assert path.endswith(f"{revision}/config.json")


def test_without_the_files_and_a_hub_it_is_one_sentence(monkeypatch, refusing):
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    calls = []

    def load():
        calls.append(constants.HF_HUB_OFFLINE)
        raise OSError("no such file")

    with pytest.raises(
        InputError, match=r"the model are not on this machine and no model hub could be reached .*; wait"
    ):
        load_from_hub(load, "the model", "wait")
    assert calls == [True]


def test_what_the_hub_refuses_is_one_sentence(monkeypatch, answering):
    monkeypatch.setattr(constants, "ENDPOINT", answering[0])

    def load():
        if constants.HF_HUB_OFFLINE:
            raise OSError("not here")
        raise ValueError("404\nNot Found")

    with pytest.raises(InputError, match=r"^they cannot be loaded from the hub \(404 Not Found\); check the name$"):
        load_from_hub(load, "they", "wait")


def test_libraries_are_quiet_while_they_load(caplog):
    def load():
        logging.warning("noise")
        warnings.warn("noise", stacklevel=1)
        return 3

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_from_hub(load, "it", "wait") == 3
    assert not caught
    assert not caplog.records
    logging.getLogger("after").warning("heard")
    assert [record.message for record in caplog.records] == ["heard"]


def test_the_setting_of_the_client_comes_back():
    seen = []

    def stop():
        with local_files_only():
            seen.append(constants.HF_HUB_OFFLINE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert (seen, constants.HF_HUB_OFFLINE) == ([True], False)


def test_a_data_set_by_name_without_a_hub_ends_with_one_line(monkeypatch, tmp_path, refusing):
    pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    sentence = refused("extract", "hf:ada/shoes", "--out", tmp_path / "cache")
    assert "the images of ada/shoes are not on this machine and no model hub could be reached" in sentence
    assert sentence.endswith("; name a folder it is saved in")


@pytest.mark.parametrize("model", [("hf-hub:ada/shoes",), ("RN50", "--pretrained", "openai")])
def test_extract_without_a_hub_ends_with_one_line(monkeypatch, tmp_path, refusing, model):
    monkeypatch.setattr(constants, "ENDPOINT", refusing)
    images = write_images(tmp_path / "images", {"train/cat": 1})
    sentence = refused("extract", images, "--out", tmp_path / "cache", "--model", *model)
    assert "are not on this machine and no model hub could be reached" in sentence
    assert "lite0-minilm" in sentence
