from __future__ import annotations

import huggingface_hub.constants
import numpy as np
import pytest

from tests.cli.program import run as command
from tests.exports.hub_server import TOKEN, HubServer
from ulfine_fast import FitConfig, InputError, export, fit, load, push
from ulfine_fast.exports import pull


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        # its client reads these when it is imported
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def fitted(clusters):
    config = FitConfig(method="linear_probe", n1=40, gamma_l=4, gamma_u=4, steps=5, eval_every=5)
    return fit(clusters, config, progress=False)


@pytest.fixture
def folder(fitted, tmp_path):
    return export(fitted, tmp_path / "model")


def pushed(hub, folder, repo="ada/shoes"):
    return push(folder, repo, token=TOKEN, endpoint=hub.address)


def test_what_was_pushed_loads_with_the_runs_own_numbers(hub, folder, fitted, clusters):
    address = pushed(hub, folder)
    assert address.startswith(f"{hub.address}/ada/shoes/commit/")
    again = load(pull("hf://ada/shoes", endpoint=hub.address))
    np.testing.assert_allclose(again.predict_proba(clusters.plain), fitted.predict_proba(clusters.plain), atol=1e-6)


def test_one_commit_holds_the_folders_files_and_no_others(hub, folder):
    (folder / "notes.txt").write_text("not for others")
    pushed(hub, folder)
    assert len(hub.commits["ada/shoes"]) == 2  # the empty first commit, and the push
    sent = hub.commits["ada/shoes"][-1]
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == body for name, body in sent.items())
    assert hub.messages == ["linear_probe over 4 classes, as safetensors"]


def test_a_second_push_is_a_second_commit_and_the_first_still_loads(hub, folder, fitted, tmp_path):
    first = pushed(hub, folder).rpartition("/")[2]
    later = export(fitted, tmp_path / "later", to="safetensors")
    (later / "README.md").write_text("another card")
    pushed(hub, later)
    assert (pull("hf://ada/shoes", endpoint=hub.address) / "README.md").read_text() == "another card"
    older = pull(f"hf://ada/shoes@{first}", endpoint=hub.address)
    assert (older / "README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_the_command_and_load_by_address(hub, folder, clusters):
    done = command("push", folder, "hf://ada/private-shoes", "--private", "--message", "first words", "--json")
    assert done.exit_code == 0, done.output
    assert hub.private["ada/private-shoes"]
    assert hub.messages == ["first words"]
    assert load("hf://ada/private-shoes").predict(clusters.plain).shape == (len(clusters.plain),)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("hf://ada/nothing", r"the server refused ada/nothing \(404\)"),
        ("hf://ada/one/too/many", "a repository is named owner/name"),
    ],
)
def test_a_missing_repository_is_one_sentence(hub, address, sentence):
    with pytest.raises(InputError, match=sentence):
        pull(address, endpoint=hub.address)


def test_a_wrong_token_is_one_sentence(hub, folder):
    with pytest.raises(InputError, match=r"refused ada/shoes \(401\); check the name and the token"):
        push(folder, "ada/shoes", token="hf_wrong", endpoint=hub.address)


def test_a_run_folder_is_not_pushed(hub, tmp_path):
    with pytest.raises(InputError, match="name a folder that `ulfine-fast export` wrote"):
        pushed(hub, tmp_path)
    assert not hub.commits


def test_no_connection_is_one_sentence(folder, tmp_path):
    with HubServer() as closed:
        address = closed.address
    with pytest.raises(InputError, match="cannot be reached"):
        push(folder, "ada/shoes", token=TOKEN, endpoint=address)
    with pytest.raises(InputError, match="cannot be reached"):
        pull("hf://ada/shoes", endpoint=address)
