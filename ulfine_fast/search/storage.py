"""The database of a study: opened, checked before it is believed, and its failures in one sentence.

Optuna and SQLAlchemy are imported inside functions: they take half a second to start.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import opened_regular_file

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

DATABASE = "sweep.db"
RESTORE = "restore it from a copy, or name a new --out or --study"
"""What to do about a study that cannot be read, the end of a sentence."""

_TIMEOUT = 60  # seconds that SQLite waits for another process to finish writing


def database_url(folder: Path) -> str:
    """URL of the database in a sweep's own folder.

    Raises:
        InputError: a name that a URL cannot hold, with some versions of SQLAlchemy.
    """
    from sqlalchemy.engine import URL, make_url

    path = str(folder / DATABASE)
    url = URL.create("sqlite", database=path).render_as_string(hide_password=False)
    if make_url(url).database != path:
        raise InputError(f"the URL of a database cannot hold the name {folder}; name a folder of letters and digits")
    return url


def open_storage(url: str) -> RDBStorage:
    """Optuna's storage behind a database's URL.

    Raises:
        InputError: no such database, one whose driver is not installed, or a file that is damaged or something else.
    """
    import optuna
    from sqlalchemy import event
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"--storage {url!r} is no database URL; give one such as sqlite:///sweep.db") from error
    arguments: dict[str, Any] = {}
    if parts.get_backend_name() == "sqlite":
        arguments = {"connect_args": {"timeout": _TIMEOUT}}
        if parts.database and parts.database != ":memory:":
            _check_sqlite(Path(parts.database))
    try:
        # Optuna fills in a URL as a format string
        storage = optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=arguments)
    # a driver, a server and a database of another program may each fail in its own way
    except Exception as error:
        raise InputError(
            f"cannot open the storage {without_password(url)} ({_reason(error)}); "
            + ("make room, or check that it can be written" if arguments else "check the URL and its driver")
        ) from error
    if arguments:
        event.listen(storage.engine, "connect", _set_up_sqlite)
        storage.engine.dispose()
    return storage


def without_password(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@contextlib.contextmanager
def storage_failures(url: str) -> Iterator[None]:
    """Turns a database that fails inside the context, as on a full disk, into one sentence.

    Raises:
        InputError: instead of an error of Optuna's storage, SQLAlchemy or SQLite.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        raise InputError(
            f"the study's database {without_password(url)} failed ({_reason(error)}); make room and let it be written, "
            "then run the same command again: what is finished stays"
        ) from error


@contextlib.contextmanager
def reading_study(url: str) -> Iterator[None]:
    """Turns a study whose content cannot be read inside the context into one sentence.

    Raises:
        InputError: instead of any error: values of every type may be in a database.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (InputError, MemoryError, StorageInternalError, SQLAlchemyError):
        raise
    except Exception as error:
        raise InputError(
            f"the study in {without_password(url)} cannot be read ({_reason(error)}); {RESTORE}"
        ) from error


def _check_sqlite(path: Path) -> None:
    """Refuse a file that is no database, is damaged, lacks tables, or runs statements of its own.

    Raises:
        InputError: says what is wrong with it.
    """
    from optuna.storages._rdb.models import BaseModel

    try:
        with opened_regular_file(path):
            pass
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {RESTORE}") from error

    tables = {*BaseModel.metadata.tables, "alembic_version"}
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_TIMEOUT)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            schema = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
            damage = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    # text that is not UTF-8 raises an error of its own
    except (sqlite3.Error, UnicodeError) as error:
        raise InputError(f"{path} is no database that can be read ({_reason(error)}); {RESTORE}") from error
    if damage != "ok":
        raise InputError(f"{path} is damaged ({' '.join(damage.split())}); {RESTORE}")

    # a view may never end, a trigger changes what is written
    for kind, name, table, statement in schema:
        plain = kind == "index" or (kind == "table" and str(statement).startswith("CREATE TABLE"))
        if table in tables and not plain:
            raise InputError(f"{path} has a {kind} {name!r} that Optuna did not make; {RESTORE}")

    # the version is written last: without it a process died while it made the tables
    present = {name for kind, name, *_ in schema if kind == "table"}
    missing = sorted(tables - present)
    if "alembic_version" in present and missing:
        raise InputError(f"{path} lacks the table {missing[0]}; {RESTORE}")


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """A commit to SQLite then need not wait for the disk, and survives the death of the process."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(error: BaseException) -> str:
    """The first line of the error that the driver or the innermost library raised."""
    while True:
        inner = getattr(error, "orig", None) or error.__cause__
        if inner is None:
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}" if not isinstance(error, sqlite3.Error) else lines[0]
        error = inner
