"""The page's server: on this machine only, behind a token, accepting writes from its own page only."""

from __future__ import annotations

import secrets
import traceback
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import msgspec
from flask import Blueprint, Flask, Response, abort, current_app, jsonify, request
from werkzeug.serving import WSGIRequestHandler
from werkzeug.serving import make_server as _make_server

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.json_files import check_schema, parse_json
from ulfine_fast.report.images import UNREADABLE, encode_preview
from ulfine_fast.review.groups import TABS, Tab
from ulfine_fast.review.session import PAGE, Change, Conflict, Session

if TYPE_CHECKING:
    from werkzeug.serving import BaseWSGIServer

HOST = "127.0.0.1"
_SIDE = 512  # pixels of the longer side of an image
_THUMBNAIL = 192  # pixels of the longer side of one in the grid
_MAX_BODY = 256 << 10  # bytes of a request; the page sends labels of the images on it
_TIMEOUT = 30  # seconds that a request may take to arrive
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # the address contains the token
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    row: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    label: str | None
    expected: str | None


class _Changes(msgspec.Struct, forbid_unknown_fields=True):
    changes: Annotated[list[_Change], msgspec.Meta(min_length=1, max_length=PAGE)]


_page = Blueprint("page", __name__)


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(24)


def create_app(session: Session, token: str) -> Flask:
    """The application.

    Every address begins with the token. A request must name this machine as its host, so that no other name can be
    pointed here, and one that writes must come from the page itself, as JSON.

    Args:
        session: the review.
        token: as :func:`new_token` returns it.
    """
    app = _Application(token)
    app.config["MAX_CONTENT_LENGTH"] = _MAX_BODY
    app.extensions["session"] = session
    app.before_request(_refuse_other_origins)
    app.after_request(_add_headers)
    app.register_error_handler(InputError, _bad_input)
    app.register_error_handler(Conflict, _conflict)
    app.register_error_handler(500, _failure)
    app.register_blueprint(_page, url_prefix=f"/{token}")
    return app


def make_server(session: Session, token: str, port: int = 0) -> BaseWSGIServer:
    """A server for `serve_forever`; its `port` is the given one, or a free one for 0.

    Raises:
        InputError: the port is in use.
    """
    try:
        return _make_server(HOST, port, create_app(session, token), threaded=True, request_handler=_QuietHandler)
    # for a port in use the library prints a message and exits the process
    except (OSError, SystemExit) as error:
        raise InputError(f"port {port} of {HOST} cannot be opened; name another with --port, or 0 for any") from error


class _Application(Flask):
    """An application that keeps the token out of its messages.

    Args:
        token: with which every address begins.
    """

    def __init__(self, token: str) -> None:
        super().__init__("ulfine_fast.review", static_folder=None)
        self._token = token

    def log_exception(self, exc_info: Any) -> None:
        """Write the traceback without the request's address."""
        text = "".join(traceback.format_exception(*exc_info))
        self.logger.error("a request failed\n%s", text.replace(self._token, "TOKEN"))


class _QuietHandler(WSGIRequestHandler):
    """A handler that keeps requests, whose addresses hold the token, out of the terminal."""

    timeout = _TIMEOUT

    def log(self, *_: Any) -> None:
        return


def _session() -> Session:
    session: Session = current_app.extensions["session"]
    return session


# -- before and after each request


def _refuse_other_origins() -> None:
    if urlsplit(f"//{request.host}").hostname not in (HOST, "localhost"):
        abort(403)
    if request.method in ("GET", "HEAD"):
        return
    if request.headers.get("Origin") != request.host_url.rstrip("/") or not request.is_json:
        abort(403)


def _add_headers(response: Response) -> Response:
    response.headers.update(_HEADERS)
    return response


def _bad_input(error: InputError) -> tuple[Response, int]:
    return jsonify(error=str(error)), 422


def _failure(_error: Exception) -> tuple[Response, int]:
    return jsonify(error="the request failed; the terminal of the review says why"), 500


def _conflict(error: Conflict) -> tuple[Response, int]:
    return jsonify(error=str(error), labels=error.labels), 409


# -- addresses


@_page.get("/", defaults={"name": "page.html"})
@_page.get("/<any('review.js', 'review.css'):name>")
def _file(name: str) -> Response:
    kind = {"html": "text/html", "js": "text/javascript", "css": "text/css"}[name.rpartition(".")[2]]
    return Response(files("ulfine_fast.review").joinpath(name).read_text(encoding="utf-8"), mimetype=kind)


@_page.get("/state")
def _state() -> Response:
    return jsonify(_session().state())


@_page.get(f"/pages/<any({', '.join(TABS)}):tab>/<int:group>/<int:page>")
def _group_page(tab: Tab, group: int, page: int) -> Response:
    return jsonify(_session().page(tab, group, page, request.args.get("version", type=int)))


@_page.get("/images/<int:row>")
def _image(row: int) -> Response:
    return _preview(row, _SIDE, quality=90)


@_page.get("/thumbnails/<int:row>")
def _thumbnail(row: int) -> Response:
    return _preview(row, _THUMBNAIL, quality=80)


def _preview(row: int, side: int, quality: int) -> Response:
    try:
        data, kind = encode_preview(_session().image(row), side=side, quality=quality)
    except UNREADABLE:
        abort(404)
    return Response(data, mimetype=f"image/{kind}")


@_page.put("/labels")
def _put_labels() -> Response | tuple[Response, int]:
    try:
        body = parse_json(request.get_data(), object, name="the request", fix="send JSON")
    except InputError as error:
        return jsonify(error=str(error)), 400
    changes = check_schema(body, _Changes, name="the request", fix="send the changes of the page").changes
    if len({one.row for one in changes}) < len(changes):
        raise InputError("the request changes one image twice; send one label for each")
    _session().put([Change(one.row, one.label, one.expected) for one in changes])
    return jsonify(saved=len(changes))


@_page.post("/proposal")
def _propose_others() -> tuple[Response, int]:
    _session().propose_others()
    return jsonify(started=True), 202


@_page.post("/fit")
def _fit() -> tuple[Response, int]:
    return jsonify(started=_session().fit()), 202
