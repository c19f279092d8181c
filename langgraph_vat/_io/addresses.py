"""
Where the tiers are and how to log in, whatever form it was given in.

One address serves both colours: a client or pool that somebody has is asked
where it connects and as whom, and connections of our own are made from that,
blocking ones and those of each event loop. What was given stays its owner's.
"""

import asyncio
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import psycopg
import redis
import redis.asyncio
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from redis.backoff import NoBackoff
from redis.connection import SSLConnection, parse_url

from langgraph_vat.errors import ConfigurationError, UnavailableError
from langgraph_vat.settings import Settings

# Bytes of a name; of a longer one Postgres drops the rest, and says nothing.
_MOST_NAME = 63


class ConnectionPool(Protocol):
    """What we use of psycopg_pool's ConnectionPool and AsyncConnectionPool."""

    conninfo: Any
    kwargs: Any


PostgresSource = str | Callable[[], str] | ConnectionPool
RedisClient = redis.Redis | redis.RedisCluster | redis.asyncio.Redis | redis.asyncio.RedisCluster
RedisSource = str | RedisClient

# Of a pool's connections these are its owner's taste; ours are read by us alone.
_NOT_TAKEN = ("autocommit", "row_factory", "cursor_factory", "context")


class PostgresAddress:
    """
    A Postgres, perhaps of several hosts, perhaps behind a connection pooler.

    Args:
        given: A connection string; a function that returns one, called for
            each new connection (for passwords that expire); or a psycopg_pool.
        settings: Time limits.
        schema: Postgres schema of the tables; None for the role's default.
    """

    def __init__(
        self, given: PostgresSource, settings: Settings, schema: str | None, *, is_hot: bool = False
    ) -> None:
        self._source: Any = given
        self._extra: Any = {}
        if hasattr(given, "conninfo") and hasattr(given, "kwargs"):
            self._source, self._extra = given.conninfo or "", given.kwargs or {}
        elif not (isinstance(given, str) or callable(given)):
            msg = (
                "postgres must be a connection string, a function that returns one, or a"
                f" psycopg_pool; not {type(given).__name__}"
            )
            raise ConfigurationError(msg)
        elif not given:
            raise _unreadable()
        if any(map(asyncio.iscoroutinefunction, (self._source, self._extra))):
            msg = (
                "a function that says how to connect to Postgres must be a plain one, not `async`:"
                " blocking calls need it too. For asyncio it runs in a thread of its own"
            )
            raise ConfigurationError(msg)
        if schema is not None and not _is_schema(schema):
            msg = (
                "schema must be a plain identifier: letters, digits and underscores, at most 63"
                " bytes, and not one that Postgres keeps for itself (pg_)"
            )
            raise ConfigurationError(msg)
        self._timeout_s = settings.timeout_s
        self.schema = schema
        self._is_hot = is_hot
        self._is_pooled: bool | None = None
        if not self._is_asked:
            self.parameters()

    @property
    def _is_asked(self) -> bool:
        return callable(self._source) or callable(self._extra)

    def parameters(self) -> dict[str, Any]:
        """
        Return the arguments of a new connection.

        Raises:
            ConfigurationError: The connection string cannot be read.
            UnavailableError: The function that should return it raised.
        """
        source, extra = self._ask(self._source), self._ask(self._extra)
        try:
            given = conninfo_to_dict(source) if isinstance(source, str) else None
        except psycopg.ProgrammingError:
            given = None
        if given is None:
            # Outside the handler: libpq's message quotes the string, password included.
            raise _unreadable()
        given |= {name: value for name, value in extra.items() if name not in _NOT_TAKEN}
        given.setdefault("connect_timeout", max(2, int(self._timeout_s)))
        given.setdefault("application_name", "langgraph-vat")
        if "," in str(given.get("host", "")) + str(given.get("hostaddr", "")):
            given.setdefault("target_session_attrs", "read-write")
        if self._is_pooled:
            given["prepare_threshold"] = None
        elif self._is_pooled is not None:  # a pooler would refuse options
            given["options"] = f"{given.get('options', '')} {self._options}".strip()
        return {**given, "autocommit": True}

    async def aparameters(self) -> dict[str, Any]:
        """Like `parameters`; a function, that may ask a service, has a thread to itself."""
        return await asyncio.to_thread(self.parameters) if self._is_asked else self.parameters()

    @staticmethod
    def _ask(source: Any) -> Any:
        if not callable(source):
            return source
        try:
            return source()
        except Exception as error:
            msg = (
                "no connection to Postgres: the function that gives its connection string raised"
                f" {type(error).__name__}. Nothing was written."
            )
            raise UnavailableError(msg) from error

    def note_backend(self, told: int, real: int) -> None:
        """
        Learn from a first connection whether it is a session.

        A pooler in transaction mode lends another one for each transaction:
        it makes up the process id that it tells at the start. Statements
        prepared by name and settings of a session then do not hold.

        Args:
            told: Process id that the connection was told when it began.
            real: Process id of the session in which a statement ran.
        """
        self._is_pooled = told != real

    @property
    def _options(self) -> str:
        # A lock, and then what is there now: whatever the database's default is.
        isolation = r"-c default_transaction_isolation=read\ committed"
        return isolation if self.schema is None else f"{isolation} -c search_path={self._path}"

    @property
    def _path(self) -> str:
        # The types of extensions are in one of these, by the habits of most hosts.
        return f'"{self.schema}",public,extensions'

    @property
    def transaction(self) -> sql.Composed:
        """What each transaction begins with."""
        # Whoever holds locks and is frozen must not hold them for ever.
        idle_ms = str(int(self._timeout_s * 3000))
        settings = {"idle_in_transaction_session_timeout": idle_ms}
        if self.is_path_lost:
            settings["search_path"] = self._path
        if self._is_hot:  # else the tables' triggers refuse what it writes
            settings["langgraph_vat.writer"] = "hot"
        calls = (
            sql.SQL("set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(value))
            for name, value in settings.items()
        )
        return sql.SQL("SELECT {}").format(sql.SQL(", ").join(calls))

    @property
    def is_path_lost(self) -> bool:
        """Whether each statement needs a transaction, to say where the tables are."""
        return bool(self._is_pooled) and self.schema is not None

    def __str__(self) -> str:
        """Where it is, without credentials; nothing if one seems to have strayed into it."""
        parts = self.parameters()
        host, port = str(parts.get("host", "localhost")), str(parts.get("port", 5432))
        database = str(parts.get("dbname", parts.get("user")))
        is_plain = port.replace(",", "").isdigit() and "@" not in host
        if not is_plain or any(character in database for character in "@:/"):
            return ""
        return f"host {host!r}, port {port}, database {database!r}"


def _is_schema(name: Any) -> bool:
    is_plain = isinstance(name, str) and name.isidentifier()
    return is_plain and len(name.encode()) <= _MOST_NAME and not name.startswith("pg_")


def _unreadable() -> ConfigurationError:
    return ConfigurationError(
        "the Postgres connection string cannot be read; write postgresql://user@host:port/name,"
        " without an SQLAlchemy driver name, and characters such as / @ : % in a password as"
        " %2F %40 %3A %25"
    )


_TLS = (SSLConnection, redis.asyncio.SSLConnection)
# Of a client's connections these say as whom; beside them, all about TLS.
_CREDENTIALS = ("db", "username", "password", "credential_provider", "client_name")
_PLACE = ("host", "port", "path", "connection_class")


class RedisAddress:
    """
    A Redis: one server, one that Sentinels watch, or a cluster.

    Args:
        given: A URL, or a client of redis-py, blocking or asyncio.
        settings: Time limits.
    """

    def __init__(self, given: RedisSource, settings: Settings) -> None:
        self._limits = {
            "socket_timeout": settings.timeout_s,
            "socket_connect_timeout": settings.timeout_s,
        }
        self._path: str | None = None
        self._nodes: list[tuple[str, int]] = []
        self._service: str | None = None
        self._sentinel: dict[str, Any] = {}
        self._is_cluster = False
        self._options: dict[str, Any] = {}
        self._may_name = True
        if isinstance(given, str):
            self._read_url(given)
        elif isinstance(given, redis.RedisCluster | redis.asyncio.RedisCluster):
            self._read_cluster(given)
        elif isinstance(given, redis.Redis | redis.asyncio.Redis):
            self._read_pool(given.connection_pool)
        else:
            msg = f"redis must be a URL or a client of redis-py, not {type(given).__name__}"
            raise ConfigurationError(msg)
        problem = self._problem()
        if problem:
            # Outside the handler: the driver's message may quote a value.
            raise ConfigurationError(
                f"{self._culprit()} of the Redis URL or client cannot be used ({problem});"
                " nothing was connected. Correct it, or leave it out."
            )

    def _problem(self) -> str:
        """Return the type of what a client is refused with; nothing if it can be made."""
        try:
            self.client(redis.asyncio)
        except (TypeError, ValueError, redis.RedisError, redis.RedisClusterException) as error:
            return type(error).__name__
        return ""

    def _culprit(self) -> str:
        """Return the option without which a client can be made, if it is one alone."""
        given = self._options
        for name in given if self._may_name else ():
            self._options = {other: value for other, value in given.items() if other != name}
            if not self._problem():
                return f"option {name!r}"
        return "an option"

    def client(self, colour: ModuleType, timeout_s: float | None = None) -> Any:
        """
        Return a client, that has not connected unless it is a blocking cluster's.

        Args:
            colour: Module ``redis``, or ``redis.asyncio``.
            timeout_s: Seconds for a connection or an answer, whatever was given else.
        """
        # At once, on another connection. Not after a timeout: one has waited enough.
        retry = colour.retry.Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        short = {} if timeout_s is None else dict.fromkeys(self._limits, timeout_s)
        options = {**self._limits, **self._options, **short, "protocol": 2, "retry": retry}
        if self._service is not None:
            limits = {**self._limits, **self._sentinel, **short}
            sentinel = colour.Sentinel(self._nodes, sentinel_kwargs=limits, **options)
            return sentinel.master_for(self._service)
        if self._is_cluster:
            nodes = [colour.cluster.ClusterNode(*node) for node in self._nodes]
            return colour.RedisCluster(startup_nodes=nodes, **options)
        if self._path is not None:
            return colour.Redis(unix_socket_path=self._path, **options)
        host, port = self._nodes[0]
        return colour.Redis(host=host, port=port, **options)

    def __str__(self) -> str:
        """Where it is, without credentials."""
        nodes = ", ".join(f"{host}:{port}" for host, port in self._nodes)
        kind = "cluster " if self._is_cluster else ""
        service = f"{self._service!r} of sentinels " if self._service is not None else ""
        return kind + service + (self._path or nodes)

    def _read_url(self, url: str) -> None:
        scheme, separator, rest = url.partition("://")
        scheme, _, kind = scheme.partition("+")
        is_known = scheme in ("redis", "rediss") and kind in ("", "cluster", "sentinel")
        if not separator or not (is_known or (scheme == "unix" and not kind)):
            msg = (
                "the Redis URL must start with redis://, rediss:// (TLS), unix://,"
                " redis+cluster:// or redis+sentinel://"
            )
            raise ConfigurationError(msg)
        try:
            self._read_address(scheme, kind, rest)
        except ValueError:
            is_readable = False
        else:
            is_readable = True
        if not is_readable:
            # Outside the handler: the driver's message quotes the URL, password included.
            msg = (
                "the Redis URL cannot be read; write redis://user:password@host:port/0, with the"
                " number of a database or none, and characters such as / @ : % in a password as"
                " %2F %40 %3A %25; for Sentinels"
                " redis+sentinel://host:26379,host:26379/service"
            )
            raise ConfigurationError(msg)

    def _read_address(self, scheme: str, kind: str, rest: str) -> None:
        url = urlsplit(f"{scheme}://{rest}")
        credentials, at, places = url.netloc.rpartition("@")
        first, *others = places.split(",")
        path = url.path
        if kind == "sentinel":
            _, self._service, *database = path.split("/")
            path = "/".join(["", *database])
            if not self._service:
                raise ValueError
        if scheme != "unix" and not (unquote(path).replace("/", "") or "0").isdecimal():
            raise ValueError  # the driver would take database 0 instead
        # Behind a ? in a password, its rest is taken for the name of an option.
        self._may_name = "@" not in unquote(url.query)
        alone = f"{scheme}://{credentials}{at}{first}{path}?{url.query}"
        found = parse_url(alone)  # type: ignore[no-untyped-call]
        self._path = found.get("path")
        self._is_cluster = kind == "cluster"
        port = 26_379 if kind == "sentinel" else 6379
        self._nodes = [(found.get("host", "localhost"), found.get("port", port))]
        for other in others:
            more = parse_url(f"redis://{other}")  # type: ignore[no-untyped-call]
            self._nodes.append((more.get("host", "localhost"), more.get("port", port)))
        self._take(found, [name for name in found if name not in _PLACE])

    def _read_pool(self, pool: Any) -> None:
        kwargs = pool.connection_kwargs
        manager = getattr(pool, "sentinel_manager", None)
        if manager is not None:
            self._service = pool.service_name
            self._sentinel = dict(manager.sentinel_kwargs)
            watchers = [one.connection_pool.connection_kwargs for one in manager.sentinels]
            self._nodes = [(one["host"], one["port"]) for one in watchers]
        elif "path" in kwargs:
            self._path = kwargs["path"]
        else:
            self._nodes = [(kwargs.get("host", "localhost"), kwargs.get("port", 6379))]
        self._take({**kwargs, "connection_class": pool.connection_class}, _CREDENTIALS)

    def _read_cluster(self, client: Any) -> None:
        nodes = client.nodes_manager.startup_nodes.values()
        self._is_cluster = True
        self._nodes = [(node.host, node.port) for node in nodes]
        knows = client if hasattr(client, "connection_kwargs") else client.nodes_manager
        self._take(knows.connection_kwargs, _CREDENTIALS)

    def _take(self, kwargs: dict[str, Any], names: Iterable[str]) -> None:
        """Keep what both kinds of client understand; refuse to leave out what is about security."""
        has_tls = kwargs.get("ssl") or issubclass(kwargs.get("connection_class", object), _TLS)
        tls = [name for name in kwargs if has_tls and name.startswith("ssl_")]
        wanted = {name: kwargs[name] for name in (*names, *tls) if kwargs.get(name) is not None}
        ocsp = {name for name in wanted if "ocsp" in name}
        if any(wanted[name] for name in ocsp):
            msg = "Redis connections that check OCSP are not supported: asyncio ones cannot"
            raise ConfigurationError(msg)
        self._options = {name: value for name, value in wanted.items() if name not in ocsp}
        if not self._options.get("db"):
            self._options.pop("db", None)  # a cluster has none
        if has_tls:
            self._options["ssl"] = True
            own = {name: value for name, value in self._options.items() if name.startswith("ssl")}
            self._sentinel = {**own, **self._sentinel}


def all_clients(client: Any) -> list[Any]:
    """Return a client and those that it asks where to connect: who closes it must close them."""
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [client, *(manager.sentinels if manager is not None else ())]
