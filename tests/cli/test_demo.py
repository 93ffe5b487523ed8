from __future__ import annotations

import json

import typer
from typer.testing import CliRunner

from ulfine_fast.cli import demo as command
from ulfine_fast.cli.main import app


def test_json_alone_is_printed_and_the_page_opened_when_asked(tmp_path, monkeypatch):
    opened = []

    def run_commands(context, out, seeds):
        typer.echo("a table")
        return {"ulfine": {"accuracy": {"mean": 0.5}}}

    monkeypatch.setattr(command, "_run_commands", run_commands)
    monkeypatch.setattr(typer, "launch", opened.append)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    printed = json.loads(done.stdout)
    assert printed["report"] == str((tmp_path / "report.html").resolve())
    assert printed["methods"]["ulfine"]["accuracy"]["mean"] == 0.5
    assert opened == []
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--open"])
    assert "a table" in done.stdout
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]
    assert "--open" in CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).stdout
