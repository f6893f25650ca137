"""What outlives the server, in SQLite: the names of models, facts that were learned of their files, API keys.

Every function blocks on a disk: call it in a worker thread. Several threads and processes may share a database; what
`put` or `delete` acknowledged survives the death of the process and of the machine. The model that the package carries
is registered as `demo` when the database is made; deleting it sticks.

What can still be read is read: where the disk is full or may not be written, writes fail alone; a database that is
damaged when it is opened is moved aside, and a new one begins.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import peewee

from rustllama import gguf
from rustllama.core import FileIdentity, ModelInfo, ModelRecord, Preset
from rustllama.database import Database
from rustllama.errors import (
    BadModelFile,
    BadRequest,
    InternalError,
    ModelNotFound,
    NotFound,
    RustllamaError,
    SettingError,
)
from rustllama.keys import ApiKey

DEMO = "demo"
BUNDLED_MODEL = Path(__file__).parent / "demo" / "demo.gguf"

_GRAMMAR = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*(:[a-z0-9][a-z0-9._-]*)?", re.IGNORECASE)
_LONGEST_NAME = 200  # characters
_MOST_NAMES = 20  # that an error shows
_MIGRATIONS = (  # the database's user_version is the number of those that ran
    "CREATE TABLE model (canonical TEXT PRIMARY KEY, name TEXT NOT NULL, path TEXT NOT NULL, modified_at TEXT NOT NULL,"
    " modified_ns INTEGER NOT NULL, digest TEXT NOT NULL, identity TEXT NOT NULL, info TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE fact (digest TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (digest, name)) WITHOUT ROWID",
    "CREATE TABLE api_key (name TEXT PRIMARY KEY, digest TEXT NOT NULL, created_at TEXT NOT NULL, models TEXT NOT NULL,"
    " rate_per_min INTEGER, concurrency INTEGER, may_manage INTEGER NOT NULL) WITHOUT ROWID",
    "ALTER TABLE model ADD COLUMN preset TEXT NOT NULL DEFAULT '{}'",
)
VERSION = len(_MIGRATIONS)

_ApiKeys = list[ApiKey]
_log = logging.getLogger("rustllama.registry")


class _Row(peewee.Model):
    """A model's name; `identity`, `info` and `preset` are JSON."""

    canonical = peewee.TextField(primary_key=True)
    name = peewee.TextField()
    path = peewee.TextField()
    modified_at = peewee.TextField()
    modified_ns = peewee.IntegerField()
    digest = peewee.TextField()
    identity = peewee.TextField()
    info = peewee.TextField()
    preset = peewee.TextField()


class _Fact(peewee.Model):
    """What was measured or remembered of a file; `value` is JSON."""

    digest = peewee.TextField()
    name = peewee.TextField()
    value = peewee.TextField()


class _KeyRow(peewee.Model):
    """An API key; `models` is JSON."""

    name = peewee.TextField(primary_key=True)
    digest = peewee.TextField()
    created_at = peewee.TextField()
    models = peewee.TextField()
    rate_per_min = peewee.IntegerField(null=True)
    concurrency = peewee.IntegerField(null=True)
    may_manage = peewee.BooleanField()


def check_name(name: str) -> str:
    """The name without the space around it. Raises BadRequest with the grammar in words."""
    name = name.strip()
    if len(name) > _LONGEST_NAME or not _GRAMMAR.fullmatch(name):
        raise BadRequest(
            f"{name[:80]!r} is not a name for a model: use letters, digits, '.', '_' and '-', beginning with a letter "
            f"or digit, with '/' between parts and ':' before a tag, at most {_LONGEST_NAME} characters.",
            "name",
        )
    return name


def canonical(name: str) -> str:
    """What names that mean the same model have in common: lower case, without ":latest"."""
    return name.strip().lower().removesuffix(":latest")


def timestamp(now_ns: int | None = None) -> str:
    """RFC 3339 with nanoseconds and the local zone, like `2024-10-04T14:56:49.277302595-07:00`."""
    seconds, fraction = divmod(time.time_ns() if now_ns is None else now_ns, 10**9)
    moment = datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    return f"{moment[:19]}.{fraction:09d}{moment[19:]}"


def examine(name: str, path: Path) -> ModelRecord:
    """A record, as of now, of the file at `path`. Raises BadModelFile."""
    path = Path(os.path.abspath(path))
    identity, info = gguf.identity(path), gguf.read(path)
    return ModelRecord(name, str(path), timestamp(), gguf.digest(info), identity, info)


@dataclass(frozen=True, slots=True)
class Listing:
    """All models, and in sentences what is lost: databases that were moved aside and not yet deleted, and entries that
    cannot be read.
    """

    models: tuple[ModelRecord, ...]
    warnings: tuple[str, ...]


class Registry:
    """Each thread has a connection of its own."""

    def __init__(self, path: Path, *, bundled: Path = BUNDLED_MODEL, busy_timeout_s: float = 5.0) -> None:
        """Makes the folder and the database where they are missing. Raises SettingError for a place that cannot be."""
        self._path = path
        self._bundled = bundled
        self._database = Database(path, busy_timeout_s)
        self._door = self._database.door
        meta = {"database": self._database, "table_name": "model"}
        self._rows: type[_Row] = type("Row", (_Row,), {"Meta": type("Meta", (), meta)})
        meta = {"database": self._database, "table_name": "fact", "primary_key": peewee.CompositeKey("digest", "name")}
        self._facts: type[_Fact] = type("Fact", (_Fact,), {"Meta": type("Meta", (), meta)})
        meta = {"database": self._database, "table_name": "api_key"}
        self._keys: type[_KeyRow] = type("Key", (_KeyRow,), {"Meta": type("Meta", (), meta)})
        try:
            with self._database.opening(), self._door():
                self._migrate()
        finally:
            self.close()  # SQLite's connections must not go through the fork of a server's workers

    def get(self, name: str) -> ModelRecord:
        """Raises ModelNotFound, which names the models that there are."""
        with self._door():
            row = self._rows.get_or_none(self._rows.canonical == canonical(name))
            known = "" if row else self._known()
        if row is None:
            raise ModelNotFound(f"model '{name.strip()[:_LONGEST_NAME]}' not found: {known}")
        return self._record(row)

    def list(self) -> Listing:
        """The newest first, `demo` last: clients take the first for their default. What cannot be read is left out."""
        entries = list(self._entries())
        moved = [
            f"The registry was damaged and is {path} now, and a new one was begun: create models and API keys again, "
            "and delete that file, which ends this warning."
            for path in self._database.moved_aside()
        ]
        return Listing(
            tuple(entry for entry in entries if isinstance(entry, ModelRecord)),
            (*moved, *(str(entry) for entry in entries if isinstance(entry, InternalError))),
        )

    def paths(self) -> set[str]:
        """All files that names use, all parts of split ones, also those of entries that cannot be read."""
        with self._door():
            paths = {str(row.path) for row in self._rows.select(self._rows.path)}
        return paths.union(*(record.info.parts for record in self.list().models))

    def put(self, record: ModelRecord) -> None:
        """Registers it, or replaces what had the name. Raises BadRequest for a bad name."""
        check_name(record.name)
        with self._door():
            self._put(record)

    def renew(self, old: ModelRecord, new: ModelRecord) -> None:
        """Replaces `old`, unless its name was deleted or means something else by now."""
        with self._door():
            same = (self._rows.canonical == canonical(old.name)) & (self._rows.modified_at == old.modified_at)
            self._rows.update(**self._columns(new)).where(same).execute()

    def delete(self, name: str) -> None:
        """Forgets the name and leaves the file alone. Raises ModelNotFound."""
        with self._door():
            deleted = self._rows.delete().where(self._rows.canonical == canonical(name)).execute()
        if not deleted:
            self.get(name)

    def fact(self, digest: str, name: str) -> str | None:
        """JSON, as it was kept; None where it never was."""
        facts = self._facts
        with self._door():
            row = facts.get_or_none((facts.digest == digest) & (facts.name == name))
        return None if row is None else str(row.value)

    def keep_fact(self, digest: str, name: str, value: str) -> None:
        """Of the file, whatever its names are; it stays when they are deleted."""
        with self._door():
            self._facts.insert(digest=digest, name=name, value=value).on_conflict_replace().execute()

    def api_keys(self) -> _ApiKeys:
        """All API keys, by name."""
        with self._door():
            return [self._key(row) for row in self._keys.select().order_by(self._keys.name)]

    def add_api_key(self, key: ApiKey) -> None:
        """Raises BadRequest where the name is taken."""
        values = {**asdict(key), "models": msgspec.json.encode(key.models).decode()}
        with self._door():
            try:
                self._keys.insert(**values).execute()
            except peewee.IntegrityError:
                raise BadRequest(
                    f"There is a key '{key.name}': take another name, or first `rustllama key rm {key.name}`.", "name"
                ) from None

    def delete_api_key(self, name: str) -> None:
        """Raises NotFound."""
        with self._door():
            deleted = self._keys.delete().where(self._keys.name == name).execute()
        if not deleted:
            raise NotFound(f"There is no key '{name}': `rustllama key list` shows them.")

    def close(self) -> None:
        """Closes this thread's connection; it opens again when it is needed."""
        self._database.close()

    def _migrate(self) -> None:
        """Writes only what has to be written, as the place may be read-only."""
        version = self._database.pragma("user_version")
        if version > len(_MIGRATIONS):
            raise SettingError(f"{self._path} is of a newer rustllama; update this one, or set RUSTLLAMA_HOME.")
        if version < len(_MIGRATIONS):
            with self._database.atomic("IMMEDIATE"):
                self._update()
        elif self._is_demo_outdated():
            try:
                with self._door():
                    self._put_demo()
            except RustllamaError as error:
                _log.warning("the bundled model could not be registered anew: %s", error)

    def _update(self) -> None:
        version = self._database.pragma("user_version")  # now that no other process changes it
        for number, migration in enumerate(_MIGRATIONS[version:], version + 1):
            self._database.execute_sql(migration)  # type: ignore[no-untyped-call]
            self._database.pragma("user_version", number)
        if version == 0 or self._is_demo_outdated():
            self._put_demo()

    def _put_demo(self) -> None:
        if self._bundled.is_file():
            with suppress(BadModelFile):  # a damaged installation still serves other models
                self._put(examine(DEMO, self._bundled))

    def _is_demo_outdated(self) -> bool:
        """Whether the bundled model, where it is registered, moved or changed with the installation."""
        row = self._rows.get_or_none(self._rows.canonical == DEMO)
        if row is None or not self._bundled.is_file():
            return False
        try:
            return self._is_outdated(self._record(row))
        except InternalError:  # it cannot be read
            return Path(row.path) == self._bundled

    def _is_outdated(self, demo: ModelRecord) -> bool:
        path = Path(demo.path)
        if path == self._bundled:
            return gguf.identity(path) != demo.identity
        return path.parts[-3:] == ("rustllama", "demo", "demo.gguf") and not path.exists()

    def _put(self, record: ModelRecord) -> None:
        self._rows.insert(**self._columns(record)).on_conflict_replace().execute()

    def _columns(self, record: ModelRecord) -> dict[str, str | int]:
        return {
            "canonical": canonical(record.name),
            "name": record.name,
            "path": record.path,
            "modified_at": record.modified_at,
            "modified_ns": time.time_ns(),
            "digest": record.digest,
            "identity": msgspec.json.encode(record.identity).decode(),
            "info": msgspec.json.encode(record.info).decode(),
            "preset": msgspec.json.encode(record.preset).decode(),
        }

    def _entries(self) -> Iterator[ModelRecord | InternalError]:
        order = (self._rows.canonical == DEMO, self._rows.modified_ns.desc(), self._rows.canonical)
        with self._door():
            rows = list(self._rows.select().order_by(*order))
        for row in rows:
            try:
                yield self._record(row)
            except InternalError as error:
                yield error

    def _record(self, row: _Row) -> ModelRecord:
        try:
            identity = msgspec.json.decode(row.identity, type=FileIdentity)
            info = msgspec.json.decode(row.info, type=ModelInfo)
            preset = msgspec.json.decode(row.preset, type=Preset)
        except msgspec.DecodeError:
            raise InternalError(f"what {self._path} says of '{row.name}' cannot be read; create it again.") from None
        return ModelRecord(row.name, row.path, row.modified_at, row.digest, identity, info, preset)

    def _key(self, row: _KeyRow) -> ApiKey:
        try:
            models = msgspec.json.decode(row.models, type=tuple[str, ...])
        except msgspec.DecodeError:
            raise InternalError(f"what {self._path} says of the key '{row.name}' cannot be read; remove it.") from None
        return ApiKey(
            row.name, row.digest, row.created_at, models, row.rate_per_min, row.concurrency, bool(row.may_manage)
        )

    def _known(self) -> str:
        query = self._rows.select(self._rows.name).order_by(self._rows.canonical)
        names = [repr(row.name) for row in query.limit(_MOST_NAMES + 1)]
        more = ["…"] if len(names) > _MOST_NAMES else []
        return "there are " + ", ".join(names[:_MOST_NAMES] + more) if names else "none is registered yet"
