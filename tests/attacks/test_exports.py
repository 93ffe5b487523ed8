"""Export folders under attack: every file damaged in many ways is refused in one sentence, or predicts the same.

A few hundred damages by default, as many as `--mutations N` says otherwise.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.attacks import damages
from tests.attacks.test_runs import HANG_SECONDS, VARIANTS, files_of
from ulfine_fast import FitConfig, InputError, fit, load
from ulfine_fast.cache.io.digests import BLANK, sealed
from ulfine_fast.exports import export, push

DEFAULT = 300


@pytest.fixture(scope="module")
def exported(clusters, tmp_path_factory) -> Path:
    """Two runs in two formats: `safetensors`, `safetensors-other`, and so on."""
    root = tmp_path_factory.mktemp("exports")
    for name, method in (("", "lightweight"), ("-other", "ulfine")):
        options = {"n1": 40, "gamma_l": 4, "gamma_u": 4, "steps": 4, "eval_every": 2, "val_fraction": 0.3}
        run = fit(clusters, FitConfig(method=method, **options), progress=False)
        run.encoder = {"name": "x", "pretrained": None, "sha256": "ab" * 32, "image_size": 16, "dim": 16}
        for to in ("safetensors", "onnx"):
            export(run, root / f"{to}{name}", to=to)
    return root


def as_version_1(files: dict[str, bytes]) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    del config["digest"]
    return {**files, "config.json": json.dumps({**config, "version": 1}, indent=2, sort_keys=True).encode()}


def reseal(folder: Path) -> None:
    """Give the files new digests, as a program would that means the change."""
    if not all(path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        return  # a device would be read for ever, and a link written through
    try:
        config = json.loads((folder / "config.json").read_bytes())
        model = (folder / config["file"]).read_bytes()
        changed = {**config, "sha256": hashlib.sha256(model).hexdigest(), "digest": BLANK}
        (folder / "config.json").write_bytes(sealed(json.dumps(changed, indent=2, sort_keys=True).encode()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # damaged beyond that


def content(folder: Path) -> dict[str, Any]:
    """All that a user gets of an export."""
    model = load(folder)
    features = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    config = {name: value for name, value in model.config.items() if name not in ("digest", "version")}
    return {
        "probabilities": model.predict_proba(features).tobytes(),
        "class_names": model.class_names,
        "config": json.dumps(config, sort_keys=True),
    }


@pytest.mark.parametrize("to", ["safetensors", "onnx"])
def test_a_damaged_export_is_refused_or_unchanged(exported, tmp_path, request, to):
    count = request.config.getoption("--mutations") or DEFAULT
    whole = files_of(exported / to)
    pristine = {"sealed": whole, "resealed": whole, "version 1": as_version_1(whole)}
    folder = tmp_path / "export"
    damages.write_files(folder, whole)
    wanted = content(folder)
    rng = random.Random(f"{to} {count}")
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        variant, name = rng.choice(VARIANTS), rng.choice(sorted(whole))
        damage = rng.choice(damages.of_kind(Path(name)))
        what = f"mutation {number}: {damage.__name__} of {name}, {variant}"
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        damages.write_files(folder, pristine[variant])
        damage(folder / name, rng, exported / f"{to}-other" / name)
        if variant == "resealed":
            reseal(folder)
        try:
            loaded = content(folder)
        except InputError as error:
            if not damages.is_sentence(str(error)):
                raise AssertionError(what) from error
            outcomes[variant, "refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(what) from error
        if loaded == wanted:
            outcomes[variant, "unchanged"] += 1
            continue
        # of version 1 config.json has no digest, the model has
        assert variant != "sealed", f"{what}: changed content was accepted"
        assert variant != "version 1" or name == "config.json", f"{what}: changed content was accepted"
        outcomes[variant, "another model"] += 1
    print(to, dict(outcomes))  # shown with -rP
    assert sum(outcomes.values()) == count


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_export_is_neither_opened_nor_pushed(exported, tmp_path, name):
    whole = files_of(exported / "safetensors")
    message = rf"{name.replace('.', '[.]')} (has changed|is not the file|cannot be|says)"
    for position in random.Random(0).sample(range(len(whole[name])), 40):
        damages.write_files(tmp_path / "export", whole)
        data = bytearray(whole[name])
        data[position] ^= 1
        (tmp_path / "export" / name).write_bytes(data)
        for use in (load, lambda folder: push(folder, "owner/name", endpoint="http://127.0.0.1:9")):
            with pytest.raises(InputError, match=message):
                use(tmp_path / "export")


def test_the_card_is_the_users(exported, tmp_path):
    damages.write_files(tmp_path / "export", {**files_of(exported / "safetensors"), "README.md": b"license: mit"})
    assert content(tmp_path / "export") == content(exported / "safetensors")
