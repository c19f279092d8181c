"""Whoever wraps data keys may be somebody else: slow, asked seldom, and away at times."""

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat import (
    ConfigurationError,
    EncryptedSerializer,
    HybridSaver,
    InvalidInputError,
    Keyring,
    SealError,
    UnavailableError,
    UnknownKeyError,
    Vat,
    VatError,
    kms,
)
from langgraph_vat._ops.shared import key_place
from langgraph_vat.kms import AwsKmsKeyWrapper, SocketKeyWrapper
from tests.fix_processes import kill

OLD = Keyring.generate("old")
BOTH = OLD.with_key("new").with_primary("new")
REGION = "eu-central-1"


class Far:
    """A wrapper that is no keyring, and counts."""

    def __init__(self, keyring: Keyring = OLD) -> None:
        self.keyring, self.cipher = keyring, keyring.cipher
        self.asked: Counter[str] = Counter()
        self.is_away: type[VatError] | None = None

    def wrap(self, plaintext: bytes, *, associated_data: bytes) -> bytes:
        self._ask("wrap")
        return self.keyring.wrap(plaintext, associated_data=associated_data)

    def unwrap(self, wrapped: bytes, *, associated_data: bytes) -> bytes:
        self._ask("unwrap")
        return self.keyring.unwrap(wrapped, associated_data=associated_data)

    def is_current(self, wrapped: bytes) -> bool:
        return self.keyring.is_current(wrapped)

    def _ask(self, what: str) -> None:
        if self.is_away:
            raise self.is_away("away")
        self.asked[what] += 1


def at(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def checkpoint(value: Any) -> Any:
    return empty_checkpoint() | {"channel_values": {"a": value}, "channel_versions": {"a": "1"}}


def put(saver: HybridSaver, thread: str = "t", value: Any = "value") -> Any:
    return saver.put(at(thread), checkpoint(value), {"step": 0}, {"a": "1"})


def value(saver: HybridSaver, thread: str = "t") -> Any:
    found = saver.get_tuple(at(thread))
    return found and found.checkpoint["channel_values"]["a"]


@pytest.fixture
def connect(postgres_url, redis_url) -> Iterator[Any]:
    made: list[Vat] = []

    def start(keyring: Any, **options: Any) -> Vat:
        vat = Vat.connect(
            postgres_url, redis_url, keyring=keyring, flush_every=50, flush_after=600.0, **options
        )
        vat.setup()
        made.append(vat)
        return vat

    yield start
    for vat in made:
        vat.close()


def test_it_is_asked_once_for_each_data_key(connect):
    far = Far()
    vat = connect(far)
    for number in range(3):
        config = put(vat.checkpointer, f"t{number}")
        vat.store.put(("root", str(number)), "k", {"v": number})
    vat.checkpointer.flush()
    reader = connect(other := Far())
    for _ in range(3):
        assert [value(reader.checkpointer, f"t{n}") for n in range(3)] == ["value"] * 3
        assert len(list(reader.checkpointer.list(None))) == 3
        assert reader.checkpointer.get_tuple(config) is not None
        assert reader.store.get(("root", "1"), "k").value == {"v": 1}
    assert far.asked["wrap"] == other.asked["unwrap"] == 4
    vat.checkpointer.delete_thread("t0")
    assert value(reader.checkpointer, "t0") is None


async def test_who_waits_for_it_keeps_nobody_else_waiting(postgres_url, redis_url):
    others_ran = threading.Event()

    class Slow(Far):
        def _ask(self, what: str) -> None:
            assert others_ran.wait(20)  # never, if the loop itself waits here
            super()._ask(what)

    async with Vat.connect(postgres_url, redis_url, keyring=Slow()) as vat:
        putting = asyncio.ensure_future(
            vat.checkpointer.aput(at(), checkpoint("value"), {"step": 0}, {"a": "1"})
        )
        storing = asyncio.ensure_future(vat.store.aput(("a",), "k", {"v": 1}))
        await asyncio.sleep(0.2)
        others_ran.set()
        await putting
        await storing
        assert (await vat.checkpointer.aget_tuple(at())) is not None


def test_while_it_is_away_known_threads_go_on_and_others_are_refused_whole(connect):
    far = Far()
    vat = connect(far)
    put(vat.checkpointer)
    far.is_away = UnavailableError
    put(vat.checkpointer, "t", "another")
    assert value(vat.checkpointer) == "another"
    for refused in (lambda: put(vat.checkpointer, "new"), lambda: vat.store.put(("a",), "k", {})):
        with pytest.raises(UnavailableError):
            refused()
    far.is_away = None
    assert value(vat.checkpointer, "new") is None
    put(vat.checkpointer, "new")
    assert value(vat.checkpointer, "new") == "value"


@pytest.mark.parametrize("problem", [UnavailableError, ConfigurationError])
def test_a_process_that_cannot_reach_it_flushes_what_others_left(connect, postgres_url, problem):
    vat = connect(Far())
    config = put(vat.checkpointer, "a", "x" * 20_000)
    step = checkpoint("x" * 20_001)
    vat.checkpointer.put(config, step | {"channel_versions": {"a": "2"}}, {"step": 1}, {"a": "2"})
    put(vat.checkpointer, "b")
    kill(vat.checkpointer)
    away = Far()
    away.is_away = problem
    with pytest.raises(
        UnavailableError, match="wait for others"
    ):  # a patch, for which a key is needed
        connect(away).checkpointer.flush()
    with psycopg.connect(postgres_url) as connection:
        found = connection.execute("SELECT thread_id FROM checkpoints ORDER BY 1").fetchall()
    assert found == [("a",), ("b",)]
    assert value(connect(Far()).checkpointer, "a") == "x" * 20_001


def test_what_is_no_wrapper_is_refused(postgres_url):
    with pytest.raises(ConfigurationError, match="KeyWrapper"):
        HybridSaver.from_conn_string(postgres_url, keyring="secret")  # type: ignore[arg-type]
    for make in (lambda: SocketKeyWrapper("x", cipher="rot13"), lambda: OLD.with_cipher("")):
        with pytest.raises(ConfigurationError, match="cipher"):
            make()


# --- the key server ------------------------------------------------------------


# What the interpreter needs may be root's alone, so it becomes another user once it has it;
# and may be read by that user as if it had been started by him.
BECOME = """
import ctypes, os, socket, sys
from langgraph_vat import VatError, kms

user, *groups = map(int, sys.argv.pop(1).split())
os.setgroups(groups)
os.setgid(user)
os.setuid(user)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


def as_user(user: int, groups: Iterable[Any], code: str) -> list[str]:
    return [sys.executable, "-c", BECOME + code, " ".join(map(str, [user, *groups]))]


@pytest.fixture
def serve(tmp_path) -> Iterator[Any]:
    made: list[subprocess.Popen[str]] = []

    def start(
        keyring: Keyring,
        path: Path = tmp_path / "s",
        *more: str,
        user: int | None = None,
        groups: Iterable[int] = (),
    ) -> subprocess.Popen[str]:
        keys = tmp_path / f"keys-{len(made)}"
        keyring.save(keys)
        command = [sys.executable, "-m", "langgraph_vat.kms"]
        if user is not None:
            os.chown(keys, user, user)
            command = as_user(user, groups, "kms.main()")
        server = subprocess.Popen(
            [*command, "--keys", keys, "--socket", path, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.append(server)
        assert server.stdout
        assert server.stdout.readline().startswith("Keyring(") or server.wait()
        return server

    yield start
    for server in made:
        server.kill()
        server.communicate()


def test_a_key_server_keeps_the_keys(connect, serve, tmp_path):
    server = serve(OLD)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    vat = connect(SocketKeyWrapper(tmp_path / "s", timeout_s=1.0))
    put(vat.checkpointer)
    vat.store.put(("a",), "k", {"v": 1})
    assert value(connect(OLD).checkpointer) == "value"  # the form is the keyring's
    server.send_signal(signal.SIGKILL)
    server.wait()
    with pytest.raises(UnavailableError, match="key server"):
        put(vat.checkpointer, "new")
    put(vat.checkpointer, "t", "goes on")
    serve(BOTH)  # where a killed one left its socket; with a new key in front
    put(vat.checkpointer, "new")
    assert vat.rotate() == (2, 0)  # the thread and the root of before; "new" has it already
    serve(BOTH.without("old"), tmp_path / "s2")
    reader = connect(SocketKeyWrapper(tmp_path / "s2"))
    assert [value(reader.checkpointer, t) for t in ("t", "new")] == ["goes on", "value"]
    assert reader.store.get(("a",), "k").value == {"v": 1}
    assert reader.rotate() == (0, 0)


def test_errors_of_a_key_server_are_those_of_its_keyring(serve, tmp_path):
    serve(OLD)
    wrapper = SocketKeyWrapper(tmp_path / "s")
    wrapped = wrapper.wrap(b"secret", associated_data=b"place")
    assert wrapper.unwrap(wrapped, associated_data=b"place") == b"secret"
    assert wrapper.is_current(wrapped)
    assert not wrapper.is_current(BOTH.wrap(b"", associated_data=b""))
    for one, place in ((wrapped, b"another"), (wrapped[:-1], b"place"), (b"", b"place")):
        with pytest.raises(SealError):
            wrapper.unwrap(one, associated_data=place)
    with pytest.raises(UnknownKeyError, match="'new'"):
        wrapper.unwrap(BOTH.wrap(b"", associated_data=b""), associated_data=b"")
    sealed = EncryptedSerializer(wrapper)
    assert EncryptedSerializer(OLD).loads_typed(sealed.dumps_typed("a")) == "a"
    assert "secret" not in repr(wrapper)
    # It has a path and no key, so it may go to a process that is spawned.
    assert pickle.loads(pickle.dumps(wrapper)).is_current(wrapped)


@pytest.mark.parametrize(
    "request_",
    [b"", b"\0\0\0\0", b"\xff" * 8, b"\0\0\0\5\1\xff\xff\xff\xff", b"\0\0\0\1\x09", b"\0\0\0\1\1"],
)
def test_what_is_no_request_harms_no_key_server(serve, tmp_path, request_):
    serve(OLD)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.fspath(tmp_path / "s"))
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = connection.recv(100)
    assert answer == b"" or answer[4] == 1
    assert (b"1 to 1048576 bytes" in answer) == (request_ in (b"\0\0\0\0", b"\xff" * 8))
    wrapper = SocketKeyWrapper(tmp_path / "s")
    wrapped = wrapper.wrap(b"secret", associated_data=b"")
    assert wrapper.unwrap(wrapped, associated_data=b"") == b"secret"


def test_a_second_key_server_leaves_the_first_one_alone(serve, tmp_path):
    serve(OLD)
    second = serve(BOTH)
    assert second.wait() == 2
    said = second.stderr.read()
    assert said.count("no socket can be made") == said.count("another server") == 1
    assert SocketKeyWrapper(tmp_path / "s").wrap(b"", associated_data=b"")


def test_a_key_server_takes_with_it_no_socket_but_its_own(serve, tmp_path):
    first = serve(OLD)
    (tmp_path / "s").unlink()
    second = serve(OLD)
    for number in (signal.SIGTERM, signal.SIGINT):
        first.send_signal(number)
        assert first.wait() == 0
        assert first.stderr.read() == ""
        first = second
        if number == signal.SIGTERM:
            assert SocketKeyWrapper(tmp_path / "s").wrap(b"", associated_data=b"")
    assert not (tmp_path / "s").exists()


def test_many_may_ask_a_key_server_at_once(serve, tmp_path):
    server = serve(OLD)
    wrapper = SocketKeyWrapper(tmp_path / "s", timeout_s=20)
    all_there = threading.Barrier(200)

    def ask(number: int) -> bool:
        all_there.wait()
        secret = str(number).encode()
        wrapped = wrapper.wrap(secret, associated_data=b"")
        return wrapper.unwrap(wrapped, associated_data=b"") == secret

    with ThreadPoolExecutor(200) as pool:
        assert all(pool.map(ask, range(200)))
    server.send_signal(signal.SIGSTOP)  # what waits does so in its queue
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect(os.fspath(tmp_path / "s"))


def test_a_key_server_that_is_started_anew_is_asked_again(serve, tmp_path):
    server = serve(OLD)
    wrapper = SocketKeyWrapper(tmp_path / "s", timeout_s=30)
    is_over, done = threading.Event(), Counter[int]()

    def ask(number: int) -> None:
        while not is_over.is_set():
            assert wrapper.wrap(b"secret", associated_data=b"")
            done[number] += 1

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        for number in (signal.SIGKILL, signal.SIGTERM):
            server.send_signal(number)
            server.wait()
            server = serve(OLD)
        before = +done
        while any(done[number] <= before[number] + 1 for number in range(8)):
            assert not any(one.done() for one in asking)
        is_over.set()
        for one in asking:
            one.result()


def test_who_finds_the_queue_full_asks_again(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen(0)
        first.connect(os.fspath(tmp_path / "s"))
        with pytest.raises(UnavailableError, match="BlockingIOError"):
            SocketKeyWrapper(tmp_path / "s", timeout_s=0.1).wrap(b"", associated_data=b"")
        with ThreadPoolExecutor(1) as pool:
            wrapper = SocketKeyWrapper(tmp_path / "s", timeout_s=20)
            asking = pool.submit(wrapper.wrap, b"", associated_data=b"")
            time.sleep(0.1)
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                connection.sendall(b"\0\0\0\2\0x")
                assert asking.result() == b"x"


def test_slow_clients_take_no_more_than_their_time_and_their_places(serve, tmp_path):
    server = serve(OLD)
    drips: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            drip = stack.enter_context(socket.socket(socket.AF_UNIX))
            drip.connect(os.fspath(tmp_path / "s"))
            drip.send((2**16).to_bytes(4))
            drips.append(drip)
        with ThreadPoolExecutor(1) as pool:
            wrapper = SocketKeyWrapper(tmp_path / "s", timeout_s=30)
            asking, most = pool.submit(wrapper.wrap, b"", associated_data=b""), 0
            while not asking.done():
                for drip in drips:
                    with contextlib.suppress(OSError):
                        drip.send(b"\0")  # never longer without a byte than this
                status = Path(f"/proc/{server.pid}/status").read_text()
                most = max(most, int(status.partition("Threads:")[2].split()[0]))
                time.sleep(0.5)
            assert asking.result()
    assert 100 < most <= 130


@pytest.mark.parametrize("bytes_", [1, 3_000])
def test_a_server_that_drips_takes_no_more_than_the_time_given(tmp_path, bytes_):
    is_over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()

        def drip() -> None:
            with listener.accept()[0] as connection, contextlib.suppress(OSError):
                connection.sendall((2**16).to_bytes(4))
                while not is_over.wait(0.05):
                    connection.sendall(bytes(bytes_))

        with ThreadPoolExecutor(1) as pool:
            dripping = pool.submit(drip)
            begun = time.monotonic()
            with pytest.raises(UnavailableError, match="Timeout"):
                SocketKeyWrapper(tmp_path / "s", timeout_s=0.5).wrap(b"", associated_data=b"")
            assert time.monotonic() - begun < 5
            is_over.set()
            dripping.result()


def test_what_is_too_long_is_said_before_it_is_sent(tmp_path):
    wrapper = SocketKeyWrapper(tmp_path / "nobody", timeout_s=0.1)
    with pytest.raises(InvalidInputError, match="1048576"):
        wrapper.wrap(b"", associated_data=bytes(2**20))
    with pytest.raises(UnavailableError, match="FileNotFound"):
        wrapper.wrap(b"", associated_data=b"")
    with pytest.raises(ConfigurationError, match="shorter"):
        SocketKeyWrapper(tmp_path / ("x" * 110))
    for owner in ("nobody-of-that-name", None.__class__, 1.5):
        with pytest.raises(ConfigurationError, match="no user"):
            SocketKeyWrapper(tmp_path / "s", owner=owner)


@pytest.mark.parametrize(
    ("socket_", "said"),
    [
        ("absent/s", "directory does not exist"),
        ("x" * 110, "shorter one"),
        ("file", "a file"),
        ("open/s", "go-w"),
        ("group/s", "go-w"),
    ],
)
def test_where_a_key_server_makes_no_socket_it_says_why(serve, tmp_path, socket_, said):
    (tmp_path / "file").touch()
    for name, mode in (("open", 0o702), ("group", 0o770)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    server = serve(OLD, tmp_path / socket_)
    assert server.wait() == 2
    assert said in server.stderr.read()
    assert (tmp_path / "file").is_file()


def test_a_directory_for_all_is_one_where_nobody_removes_what_is_of_others(serve, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    serve(OLD, tmp_path / "open" / "s")
    wrapper = SocketKeyWrapper(tmp_path / "open" / "s")
    assert wrapper.wrap(b"", associated_data=b"")


def test_a_group_that_cannot_be_had_is_refused_and_leaves_no_socket(serve, tmp_path):
    server = serve(OLD, tmp_path / "s", "--group", "no-such-group")
    assert server.wait() == 2
    assert "no such group" in server.stderr.read()
    assert not (tmp_path / "s").exists()


# --- two users -----------------------------------------------------------------

SERVER, WORKER, STRANGER = 61_001, 61_002, 61_003
ASK = """
try:
    wrapper = kms.SocketKeyWrapper(sys.argv[1], owner=int(sys.argv[2]), timeout_s=1.0)
    print(wrapper.unwrap(wrapper.wrap(b"secret", associated_data=b""), associated_data=b""))
except VatError as error:
    print(type(error).__name__, error)
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


def run_as(user: int, code: str, *arguments: Any) -> str:
    command = [*as_user(user, [], code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture
def shared(tmp_path) -> Path:
    """A directory of the server's, into which its group may go, and a way that leads there."""
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o111)
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(0o750)
    os.chown(directory, SERVER, WORKER)
    return directory


@as_root
def test_a_worker_under_another_user_uses_the_server_and_reads_no_key(serve, tmp_path, shared):
    serve(OLD, shared / "s", "--group", str(WORKER), user=SERVER, groups=[WORKER])
    assert (shared / "s").stat().st_mode & 0o777 == 0o660
    assert run_as(WORKER, ASK, shared / "s", SERVER) == "b'secret'\n"
    assert "ConfigurationError" in (said := run_as(WORKER, ASK, shared / "s", WORKER))
    assert f"owner={SERVER}" in said
    said = run_as(WORKER, "open(sys.argv[1])", tmp_path / "keys-0")
    assert "PermissionError" in said
    shared.chmod(0o755)
    said = run_as(STRANGER, ASK, shared / "s", SERVER)
    assert said.startswith("ConfigurationError this user may not open")
    assert "--group" in said


@as_root
def test_no_other_process_of_its_user_reads_a_key_servers_memory(serve, shared):
    server = serve(OLD, shared / "s", user=SERVER)
    command = as_user(SERVER, [], "print(flush=True); input()")
    plain = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    plain.stdout.readline()
    read = "open(f'/proc/{sys.argv[1]}/mem', 'rb'); print('read')"
    try:
        assert run_as(SERVER, read, plain.pid) == "read\n"
        assert "PermissionError" in run_as(SERVER, read, server.pid)
    finally:
        plain.communicate(b"\n")


@as_root
@pytest.mark.parametrize("path", ["denied/s", "run/s"])
def test_a_server_says_that_it_may_not_write_there(serve, tmp_path, shared, path):
    (tmp_path / "denied").mkdir()
    os.chown(shared, WORKER, WORKER)
    server = serve(OLD, tmp_path / path, user=SERVER)
    assert server.wait() == 2
    assert ("may not write" if path == "denied/s" else "go-w") in server.stderr.read()


@as_root
def test_a_group_that_the_server_is_not_in_is_refused(serve, shared):
    server = serve(OLD, shared / "s", "--group", "0", user=SERVER)
    server.wait()
    assert "cannot be opened to group '0'" in server.stderr.read()


LISTEN = """
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    connection = listener.accept()[0]
    connection.settimeout(5)
    print(connection.recv(100), flush=True)
"""


@as_root
def test_who_took_the_servers_place_is_told_no_secret(shared):
    command = [*as_user(SERVER, [], LISTEN), shared / "s"]
    impostor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert impostor.stdout.readline() == "ready\n"
    with pytest.raises(ConfigurationError, match=f"user {SERVER}"):
        SocketKeyWrapper(shared / "s").wrap(b"secret", associated_data=b"")
    assert impostor.communicate()[0] == "b''\n"


# --- AWS -----------------------------------------------------------------------


@pytest.fixture
def client(monkeypatch) -> Iterator[Any]:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        yield boto3.client("kms", region_name=REGION)


def make_key(client: Any) -> str:
    return str(client.create_key()["KeyMetadata"]["KeyId"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_aws_kms_wraps_and_tells_what_is_wrong(client):
    key_id = make_key(client)
    wrapper = AwsKmsKeyWrapper(key_id, client=client)
    wrapped = wrapper.wrap(b"secret", associated_data=b"place of ada")
    assert wrapper.unwrap(wrapped, associated_data=b"place of ada") == b"secret"
    assert wrapper.is_current(wrapped)
    assert not wrapper.is_current(OLD.wrap(b"", associated_data=b""))
    assert not AwsKmsKeyWrapper(make_key(client), client=client).is_current(wrapped)
    with pytest.raises(UnknownKeyError, match="before="):
        wrapper.unwrap(OLD.wrap(b"", associated_data=b""), associated_data=b"")
    changed = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
    for one, place in (
        (wrapped, b"another"),
        (changed, b"place of ada"),
        (b"\2\0", b""),
        (b"", b""),
    ):
        with pytest.raises(SealError):
            wrapper.unwrap(one, associated_data=place)
    with pytest.raises(UnknownKeyError, match="NotFound"):
        AwsKmsKeyWrapper("0b8e7f0a-52b1-4c43-9d57-1c0a6f3f5b11", client=client).wrap(
            b"", associated_data=b""
        )


class Asked:
    """A client of KMS that tells what it was asked, and may refuse."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.asked: list[tuple[str, str]] = []
        self.code: str | None = None

    def __getattr__(self, method: str) -> Any:
        def ask(**arguments: Any) -> Any:
            from botocore.exceptions import ClientError

            self.asked.append((method, arguments["KeyId"]))
            if self.code:
                raise ClientError({"Error": {"Code": self.code}}, method)
            return getattr(self.client, method)(**arguments)

        return ask


def arn_of(client: Any, key_id: str) -> str:
    return str(client.describe_key(KeyId=key_id)["KeyMetadata"]["Arn"])


@pytest.fixture
def alias(client) -> Any:
    """Returns what gives the alias to a key, which it then names."""
    client.create_alias(AliasName="alias/vat", TargetKeyId=make_key(client))

    def give(key_id: str) -> str:
        client.update_alias(AliasName="alias/vat", TargetKeyId=key_id)
        return "alias/vat"

    return give


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["id", "arn", "alias"])
def test_a_key_of_kms_that_somebody_wrote_into_the_database_is_not_used(client, alias, form):
    ours, theirs = make_key(client), make_key(client)  # this role may decrypt with either
    name = {"id": ours, "arn": arn_of(client, ours), "alias": "alias/vat"}[form]
    alias(ours)
    forged = AwsKmsKeyWrapper(theirs, client=client).wrap(b"chosen", associated_data=b"place")
    asked = Asked(client)
    wrapper = AwsKmsKeyWrapper(name, client=asked)
    with pytest.raises(UnknownKeyError, match="also=") as refused:
        wrapper.unwrap(forged, associated_data=b"place")
    assert arn_of(client, theirs) in str(refused.value)
    wrapped = wrapper.wrap(b"secret", associated_data=b"place")
    with pytest.raises(UnknownKeyError, match=arn_of(client, ours)):
        wrapper.unwrap(forged, associated_data=b"place")
    assert not [one for one in asked.asked if "decrypt" in one]
    assert wrapper.unwrap(wrapped, associated_data=b"place") == b"secret"
    told = sum(method == "describe_key" for method, _ in asked.asked)
    assert told == {"id": 1, "arn": 0, "alias": told}[form]
    # Of ours with the ciphertext of theirs, or the reverse, KMS opens nothing.
    arn = arn_of(client, ours).encode()
    mixed = b"\2" + len(arn).to_bytes(2) + arn + forged[3 + len(arn) :]
    for changed in (mixed, wrapped + bytes(10_000)):
        with pytest.raises(SealError):
            wrapper.unwrap(changed, associated_data=b"place")
    explicit = AwsKmsKeyWrapper(name, client=client, also=[arn_of(client, theirs)])
    assert explicit.unwrap(forged, associated_data=b"place") == b"chosen"


def test_an_answer_of_another_key_of_kms_is_not_believed():
    arn = "arn:aws:kms:eu-central-1:111122223333:key/ours"

    class Client:
        def decrypt(self, **_: Any) -> Any:
            return {"KeyId": arn.replace("ours", "theirs"), "Plaintext": b"chosen"}

    wrapped = b"\2" + len(arn).to_bytes(2) + arn.encode() + b"x"
    with pytest.raises(SealError, match="another key"):
        AwsKmsKeyWrapper(arn, client=Client()).unwrap(wrapped, associated_data=b"")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_alias_moves_and_its_keys_are_rotated(connect, client, alias, monkeypatch):
    monkeypatch.setattr(kms, "_ALIAS_S", 0.2)
    first, second = make_key(client), make_key(client)
    vat = connect(AwsKmsKeyWrapper(alias(first), client=client))
    for number in range(20):
        put(vat.checkpointer, f"t{number}")
    vat.checkpointer.flush()
    alias(second)
    time.sleep(0.2)
    asked = Asked(client)
    without = connect(AwsKmsKeyWrapper("alias/vat", client=asked))
    with pytest.raises(UnknownKeyError, match=arn_of(client, first)):
        value(without.checkpointer, "t0")
    assert without.rotate() == (0, 20)
    assert "decrypt" not in dict(asked.asked)
    both = AwsKmsKeyWrapper("alias/vat", client=client, also=[arn_of(client, first)])
    assert connect(both).rotate() == (20, 0)
    assert connect(both).rotate() == (0, 0)
    assert value(without.checkpointer, "t0") == "value"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_an_alias_kms_is_asked_seldom_and_again(client, alias):
    asked = Asked(client)
    wrapper = AwsKmsKeyWrapper(alias(make_key(client)), client=asked)
    wrapped = wrapper.wrap(b"secret", associated_data=b"")
    begun = time.monotonic()
    assert all(wrapper.is_current(wrapped) for _ in range(1000))
    assert len(asked.asked) <= 2 + (time.monotonic() - begun)
    alias(make_key(client))
    time.sleep(1)
    assert not wrapper.is_current(wrapped)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_role_that_may_not_ask_is_told_and_nothing_is_counted(connect, client):
    asked, key_id = Asked(client), make_key(client)
    vat = connect(AwsKmsKeyWrapper(key_id, client=client))
    put(vat.checkpointer)
    vat.store.put(("a",), "k", {"v": 1})
    vat.checkpointer.flush()
    denied = connect(AwsKmsKeyWrapper(key_id, client=asked))
    asked.code = "AccessDeniedException"
    for refused in (
        denied.reseal,
        denied.store.reseal,
        denied.rotate,
        lambda: value(denied.checkpointer),
        lambda: put(denied.checkpointer, "new"),
    ):
        with pytest.raises(ConfigurationError, match=r"AccessDenied.*kms:Decrypt"):
            refused()
    asked.code = None
    assert denied.reseal().left == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_ciphertext_that_kms_denies_keeps_no_others_from_being_rotated(
    connect, client, postgres_url
):
    first, second = make_key(client), make_key(client)
    vat = connect(AwsKmsKeyWrapper(first, client=client))
    for number in range(3):
        put(vat.checkpointer, f"t{number}")
    vat.checkpointer.flush()
    arn = arn_of(client, first).encode()
    with psycopg.connect(postgres_url) as connection:
        found = connection.execute(
            "SELECT generation::text FROM vat_threads WHERE thread_id = 't1'"
        )
        theirs = AwsKmsKeyWrapper(second, client=client).wrap(
            b"chosen", associated_data=key_place("t1", found.fetchone()[0])
        )
        forged = b"\2" + len(arn).to_bytes(2) + arn + theirs[3 + len(arn) :]
        connection.execute("UPDATE vat_threads SET data_key = %s WHERE thread_id = 't1'", [forged])
    new = AwsKmsKeyWrapper(second, client=client, also=[arn.decode()])
    assert connect(new).rotate() == (2, 1)
    done = connect(new).reseal()
    assert (done.keys, done.left) == (2, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"key_id": None},
        {"key_id": ""},
        {"key_id": b"key"},
        {"before": "keys"},
        {"before": b"\1"},
        {"also": "arn:aws:kms:eu-central-1:111122223333:key/k"},
        {"also": ["alias/agents"]},
        {"also": [None]},
        {"also": 5},
    ],
)
def test_what_cannot_work_with_aws_kms_is_refused_at_once(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        AwsKmsKeyWrapper(**{"key_id": "k", "client": object()} | arguments)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("DisabledException", 400, UnknownKeyError),
        ("NotFoundException", 400, UnknownKeyError),
        ("IncorrectKeyException", 400, SealError),
        ("ThrottlingException", 400, UnavailableError),
        ("KMSInternalException", 500, UnavailableError),
        ("NeverHeardOf", 503, UnavailableError),
        ("AccessDeniedException", 400, ConfigurationError),
        ("ValidationException", 400, ConfigurationError),
        ("InvalidArnException", 400, ConfigurationError),
        ("UnrecognizedClientException", 400, ConfigurationError),
        ("ExpiredTokenException", 400, ConfigurationError),
        ("InvalidSignatureException", 400, ConfigurationError),
        ("NeverHeardOf", 400, ConfigurationError),
    ],
)
def test_what_aws_kms_answers_is_an_error_of_ours(code, status, kind):
    from botocore.exceptions import ClientError

    class Client:
        def encrypt(self, **_: Any) -> Any:
            answer = {
                "Error": {"Code": code, "Message": "of ada"},
                "ResponseMetadata": {"HTTPStatusCode": status},
            }
            raise ClientError(answer, "Encrypt")

    with pytest.raises(kind) as refused:
        AwsKmsKeyWrapper("k", client=Client()).wrap(b"secret", associated_data=b"")
    assert type(refused.value) is kind
    assert refused.value.__context__ is None
    assert "ada" not in str(refused.value)
    assert ("repeat" in str(refused.value)) == (kind is UnavailableError)


def test_an_aws_kms_wrapper_shows_no_key_and_is_not_pickled():
    wrapper = AwsKmsKeyWrapper("k", client=object(), before=OLD)
    assert repr(wrapper) == "AwsKmsKeyWrapper('k')"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(wrapper, protocol)
    for refused in (wrapper.__getstate__, lambda: copy.copy(wrapper)):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            refused()


def test_an_aws_kms_without_credentials_is_no_configuration(monkeypatch, tmp_path):
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    client = boto3.session.Session().client("kms", region_name=REGION)
    with pytest.raises(ConfigurationError, match="NoCredentialsError"):
        AwsKmsKeyWrapper("k", client=client).wrap(b"secret", associated_data=b"")


def test_what_aws_kms_is_told_names_nobody():
    asked: list[dict[str, Any]] = []

    class Client:
        def encrypt(self, **arguments: Any) -> Any:
            asked.append(arguments)
            return {"KeyId": "arn", "CiphertextBlob": b"x"}

    AwsKmsKeyWrapper("k", client=Client()).wrap(b"secret", associated_data=b"thread of ada")
    assert "ada" not in str(asked[0]["EncryptionContext"])


def test_an_aws_kms_without_a_region_is_no_configuration(monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with pytest.raises(ConfigurationError, match="NoRegion"):
        AwsKmsKeyWrapper("k")


def test_an_aws_kms_that_does_not_answer_is_unavailable(monkeypatch):
    import boto3
    from botocore.config import Config

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    config = Config(connect_timeout=1, retries={"max_attempts": 0})
    client = boto3.client(
        "kms", region_name=REGION, endpoint_url="http://127.0.0.1:9", config=config
    )
    with pytest.raises(UnavailableError, match="EndpointConnectionError"):
        AwsKmsKeyWrapper("k", client=client).wrap(b"secret", associated_data=b"")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_a_keyring_to_aws_kms(connect, client):
    vat = connect(OLD)
    put(vat.checkpointer)
    vat.store.put(("a",), "k", {"v": 1})
    vat.close()
    wrapper = AwsKmsKeyWrapper(make_key(client), client=client, before=OLD)
    vat = connect(wrapper)
    assert value(vat.checkpointer) == "value"
    assert vat.rotate() == (2, 0)
    alone = connect(AwsKmsKeyWrapper(wrapper._key_id, client=client))
    assert value(alone.checkpointer) == "value"
    assert alone.store.get(("a",), "k").value == {"v": 1}
