"""The page's server: on this machine alone, behind a token, taking writes from its own page only."""

from __future__ import annotations

import io
import secrets
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flask import Blueprint, Flask, Response, abort, current_app, jsonify, request
from PIL import Image
from werkzeug.serving import WSGIRequestHandler
from werkzeug.serving import make_server as _make_server

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.review.session import Conflict, Session

if TYPE_CHECKING:
    from werkzeug.serving import BaseWSGIServer

HOST = "127.0.0.1"
_SIDE = 512  # pixels of the longer side
_TINY = 64  # so few pixels are sent as they are, and drawn enlarged
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    # the address holds the token
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_GONE = (KeyError, OSError, ValueError, Image.DecompressionBombError)

_page = Blueprint("page", __name__)


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def create_app(session: Session, token: str) -> Flask:
    """The application.

    Every address begins with the token. A request must name this machine as its host, so that no other name can be
    pointed here, and one that writes must come from the page itself, as JSON.

    Args:
        session: what is reviewed.
        token: as :func:`new_token` makes it.
    """
    app = Flask("ulfine_fast.review", static_folder=None)
    app.extensions["session"] = session
    app.before_request(_refuse_strangers)
    app.after_request(_close)
    app.register_error_handler(InputError, _refused)
    app.register_error_handler(Conflict, _overtaken)
    app.register_blueprint(_page, url_prefix=f"/{token}")
    return app


def make_server(session: Session, token: str, port: int = 0) -> BaseWSGIServer:
    """A server that `serve_forever` runs; its `port` is the one asked for, or a free one for 0.

    Raises:
        InputError: the port is taken.
    """
    try:
        return _make_server(HOST, port, create_app(session, token), threaded=True, request_handler=_Quiet)
    # of a taken port this library says so itself and ends the process
    except (OSError, SystemExit) as error:
        raise InputError(f"port {port} of {HOST} cannot be had; name another with --port, or 0 for any") from error


class _Quiet(WSGIRequestHandler):
    """A handler that keeps addresses, and so the token, out of the terminal."""

    def log_request(self, *_: Any) -> None:
        return


def _session() -> Session:
    session: Session = current_app.extensions["session"]
    return session


def _refuse_strangers() -> None:
    if urlsplit(f"//{request.host}").hostname not in (HOST, "localhost"):
        abort(403)
    if request.method in ("GET", "HEAD"):
        return
    if request.headers.get("Origin") != request.host_url.rstrip("/") or not request.is_json:
        abort(403)


def _close(response: Response) -> Response:
    response.headers.update(_HEADERS)
    return response


def _refused(error: InputError) -> tuple[Response, int]:
    return jsonify(error=str(error)), 422


def _overtaken(error: Conflict) -> tuple[Response, int]:
    return jsonify(error=str(error), now=error.label), 409


@_page.get("/")
def _shown() -> Response:
    return Response(_text("page.html"), mimetype="text/html")


@_page.get("/<any('review.js', 'review.css'):name>")
def _asset(name: str) -> Response:
    kind = "text/javascript" if name.endswith("js") else "text/css"
    return Response(_text(name), mimetype=kind)


@_page.get("/state")
def _state() -> Response:
    return jsonify(_session().told())


@_page.get("/images/<int:row>")
def _image(row: int) -> Response:
    try:
        data, kind = _clean(_session().image(row))
    except _GONE:
        abort(404)
    return Response(data, mimetype=kind)


@_page.put("/labels/<int:row>")
def _put(row: int) -> Response:
    label, seen = _asked(request.get_json(silent=True))
    _session().put(row, label, seen)
    return jsonify(now=label)


@_page.post("/fit")
def _fit() -> tuple[Response, int]:
    return jsonify(started=_session().fit()), 202


def _asked(found: Any) -> tuple[str | None, str | None]:
    """The label and what the page saw, out of a request's body."""
    if not isinstance(found, dict) or set(found) != {"label", "seen"}:
        raise InputError("a label's request holds label and seen, each a text or null")
    for value in found.values():
        if not (value is None or isinstance(value, str)):
            raise InputError(f"label and seen must be texts or null, got {value!r}")
    return found["label"], found["seen"]


def _clean(image: Image.Image) -> tuple[bytes, str]:
    """An image of at most 512 pixels as PNG or JPEG, without the file's metadata, and its type."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    kind, buffer = ("PNG" if max(clean.size) <= _TINY else "JPEG"), io.BytesIO()
    clean.save(buffer, kind, quality=90)
    return buffer.getvalue(), f"image/{kind.lower()}"


def _text(name: str) -> str:
    return files("ulfine_fast.review").joinpath(name).read_text(encoding="utf-8")
