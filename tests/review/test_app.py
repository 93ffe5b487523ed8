"""Who may read and write through the server, and what it answers."""

from __future__ import annotations

import io
import json
import random
import socket
import threading
from collections import Counter

import pytest
from PIL import Image

from tests.attacks import damages
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.corrections import read_corrections
from ulfine_fast.review.app import create_app, make_server, new_token

TOKEN = "secret"
HOME = "http://127.0.0.1:5000"


@pytest.fixture
def client(session):
    return create_app(session, TOKEN).test_client()


def put(client, row=0, *, origin=HOME, host=HOME, token=TOKEN, **body):
    headers = {} if origin is None else {"Origin": origin}
    change = {"row": row, "label": "cat", "expected": None, **body}
    return client.put(f"/{token}/labels", json={"changes": [change]}, headers=headers, base_url=host)


def test_the_page_itself_may_write(client, session):
    assert put(client).status_code == 200
    assert list(read_corrections(session.labels).values()) == ["cat"]


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ({"origin": None}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:5001"}, 403),
        ({"origin": "http://evil.example:5000", "host": "http://evil.example:5000"}, 403),
        ({"token": "guess"}, 404),
    ],
)
def test_no_other_page_may_write(client, session, how, status):
    assert put(client, **how).status_code == status
    assert not session.labels.exists()


@pytest.mark.parametrize("path", ["state", "images/0", "thumbnails/0", "pages/cluster/0/0", "", "review.js"])
def test_nothing_is_read_without_the_token_or_under_another_name(client, path):
    assert client.get(f"/{TOKEN}/{path}", base_url=HOME).status_code == 200
    assert client.get(f"/guess/{path}", base_url=HOME).status_code == 404
    assert client.get(f"/{TOKEN}/{path}", base_url="http://evil.example:5000").status_code == 403


def test_a_form_of_another_page_cannot_write(client, session):
    """A form sends no JSON, and a browser sends it without asking."""
    for path in ("fit", "proposal"):
        form = {"data": "{}", "content_type": "text/plain", "headers": {"Origin": HOME}}
        assert client.post(f"/{TOKEN}/{path}", **form, base_url=HOME).status_code == 403
    assert not session.fitting
    assert not session.refitting


def test_every_answer_forbids_scripts_from_elsewhere(client):
    for path in (f"/{TOKEN}/", f"/{TOKEN}/state", "/nowhere"):
        headers = client.get(path, base_url=HOME).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers


def test_a_conflict_returns_the_label(client):
    assert put(client).status_code == 200
    again = put(client, label="dog")
    assert (again.status_code, again.get_json()["labels"]) == (409, {"0": "cat"})


@pytest.mark.parametrize(
    "body", [{"label": 3}, {"expected": []}, {"more": 1}, {"label": "bird"}, {"row": -1}, {"row": 99999}, {"row": "0"}]
)
def test_a_wrong_body_is_answered_by_a_sentence(client, session, body):
    answer = put(client, **body)
    assert answer.status_code == 422
    assert answer.get_json()["error"]
    assert not session.labels.exists()


@pytest.mark.parametrize("count", [0, 31])
def test_a_request_holds_labels_of_one_page(client, session, count):
    changes = [{"row": row, "label": "cat", "expected": None} for row in range(count)]
    headers = {"Origin": HOME}
    answer = client.put(f"/{TOKEN}/labels", json={"changes": changes}, headers=headers, base_url=HOME)
    assert answer.status_code == 422
    twice = client.put(f"/{TOKEN}/labels", json={"changes": changes[:1] * 2}, headers=headers, base_url=HOME)
    assert twice.status_code == 422
    assert not session.labels.exists()


def test_all_labels_of_a_page_are_saved_together(client, session):
    changes = [{"row": row, "label": "dog", "expected": None} for row in range(5)]
    answer = client.put(f"/{TOKEN}/labels", json={"changes": changes}, headers={"Origin": HOME}, base_url=HOME)
    assert answer.get_json() == {"saved": 5}
    assert list(read_corrections(session.labels).values()) == ["dog"] * 5


@pytest.mark.parametrize("path", ["pages/cluster/0/0?version=x", "pages/rare/99999999999/5", "pages/nothing/0/7"])
def test_a_page_that_is_not_there_is_the_last_one_or_empty(client, path):
    answer = client.get(f"/{TOKEN}/{path}", base_url=HOME)
    assert answer.status_code == 200
    assert answer.get_json()["page"] == 0


@pytest.mark.parametrize("path", ["pages/other/0/0", "pages/cluster/-1/0", "pages/cluster/0", "thumbnails/-1"])
def test_an_address_of_another_form_does_not_exist(client, path):
    assert client.get(f"/{TOKEN}/{path}", base_url=HOME).status_code == 404


def test_a_damaged_file_is_reported_and_not_overwritten(client, session):
    session.labels.write_text("mine\n")
    assert put(client).status_code == 422
    assert session.labels.read_text() == "mine\n"


def send(client, data):
    headers = {"Origin": HOME, "Content-Type": "application/json"}
    return client.put(f"/{TOKEN}/labels", data=data, headers=headers, base_url=HOME)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b'{"a":' * 10_000, b"\xff", b'"\\ud800"', b"1" * 1000, b"NaN"]
)
def test_what_is_no_json_is_answered_with_400(client, session, data):
    answer = send(client, data)
    assert answer.status_code == 400
    assert answer.get_json()["error"].startswith("the request cannot be read (")
    assert not session.labels.exists()


def test_a_long_body_is_not_read(client, session):
    assert send(client, b'{"label": "' + b"a" * 300_000 + b'"}').status_code == 413
    assert not session.labels.exists()


def test_random_requests_are_answered_by_a_sentence_or_change_one_label(client, session, request):
    """A few hundred, or as many as `--mutations N` says; none ends in a failure of the server or shows the token."""
    count = request.config.getoption("--mutations") or 400
    rng = random.Random(count)
    values = [*damages.VALUES, "cat", "dog", "", None]
    paths = ["labels"] * 6 + ["labels/x", "images/0", "images/99", "thumbnails/99999999999999999999", "pages/rare/0/0"]
    paths += ["pages/x/0/0", "pages/wrong/0/0?version=%00", "proposal", "labels/../../state", "%00", "%FF", "a" * 5000]
    paths += ["state", "?x=1", "."]
    statuses: Counter[int] = Counter()
    for _ in range(count):
        row = rng.choice([0, 1, 2, 3, -1, 10**20, None])
        change = {"row": row, "label": rng.choice(values), "expected": rng.choice([None, *values])}
        if rng.random() < 0.2:
            change[rng.choice(["more", "label", "\0"])] = rng.choice(values)
        data = json.dumps({"changes": rng.choice([[change], [change], change, [change] * 2])}).encode()
        damage = rng.randrange(6)
        if damage == 0:
            data = data[: rng.randrange(len(data))]
        elif damage == 1:
            data = bytes(byte ^ (rng.random() < 0.02) * rng.randrange(256) for byte in data)
        elif damage == 2:
            data = rng.choice(damages.RAW_VALUES)
        headers = {"Origin": rng.choice([HOME, HOME, HOME, "null"]), "Content-Type": "application/json"}
        path = f"/{rng.choice([TOKEN, TOKEN, TOKEN, 'guess'])}/{rng.choice(paths)}"
        method = rng.choice(["PUT", "PUT", "PUT", "GET", "POST", "DELETE", "OPTIONS", "HEAD"])
        before = read_corrections(session.labels) if session.labels.exists() else {}
        answer = client.open(path, method=method, data=data, headers=headers, base_url=HOME)
        after = read_corrections(session.labels) if session.labels.exists() else {}
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (method, path, data)
        if answer.status_code >= 400:
            assert TOKEN not in answer.get_data(as_text=True)
            assert after == before
        assert len({*before.items()} ^ {*after.items()}) <= 2
        assert set(after.values()) <= {*session.run.class_names, ""}
    print(dict(statuses))  # shown with -rP
    assert statuses[200] > count / 50


def test_the_token_is_in_no_message(session, monkeypatch, capfd, caplog):
    """Neither where the code fails nor where a request is malformed."""

    def fail():
        raise RuntimeError(f"cannot answer /{TOKEN}/state")

    monkeypatch.setattr(session, "state", fail)
    server = make_server(session, TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host = f"127.0.0.1:{server.port}"
    requests = {
        f"GET /{TOKEN}/state HTTP/1.1\r\nHost: {host}": b"500",
        f"GET /{TOKEN}/state more HTTP/1.1\r\nHost: {host}": b"400",
        f"GET /{TOKEN}/state HTTP/{TOKEN}\r\nHost: {host}": b"400",
        f"{TOKEN} /{TOKEN}/ HTTP/1.1\r\nHost: {host}": b"403",
        f"PUT /{TOKEN}/thumbnails/{'9' * 5000} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}": b"4",
        f"GET /{TOKEN}/{'a' * 70000} HTTP/1.1\r\nHost: {host}": b"414",
    }
    try:
        for text, status in requests.items():
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(f"{text}\r\nConnection: close\r\n\r\n".encode())
                with connection.makefile("rb") as answer:
                    assert status in answer.read()[:600], text[:80]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    printed = capfd.readouterr()
    messages = printed.out + printed.err + caplog.text
    assert "a request failed" in messages
    assert "RuntimeError" in messages
    assert TOKEN not in messages


def test_images_come_without_their_metadata(client, session):
    answer = client.get(f"/{TOKEN}/images/0", base_url=HOME)
    image = Image.open(io.BytesIO(answer.data))
    assert (answer.mimetype, image.size, dict(image.getexif())) == ("image/png", (24, 20), {})
    assert client.get(f"/{TOKEN}/images/99999", base_url=HOME).status_code == 404
    small = client.get(f"/{TOKEN}/thumbnails/0", base_url=HOME)
    assert dict(Image.open(io.BytesIO(small.data)).getexif()) == {}


def test_tokens_differ_and_a_port_in_use_is_reported(session):
    assert len({new_token() for _ in range(9)}) == 9
    server = make_server(session, TOKEN)
    try:
        with pytest.raises(InputError, match=str(server.port)):
            make_server(session, TOKEN, server.port)
    finally:
        server.server_close()
