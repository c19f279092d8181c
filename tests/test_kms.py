"""Whoever wraps data keys may be somebody else: slow, asked seldom, and away at times."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.base import empty_checkpoint

from langgraph_vat import (
    ConfigurationError,
    EncryptedSerializer,
    HybridSaver,
    Keyring,
    SealError,
    UnavailableError,
    UnknownKeyError,
    Vat,
)
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
        self.is_away = False

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
            raise UnavailableError("away")
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
    far.is_away = True
    put(vat.checkpointer, "t", "another")
    assert value(vat.checkpointer) == "another"
    for refused in (lambda: put(vat.checkpointer, "new"), lambda: vat.store.put(("a",), "k", {})):
        with pytest.raises(UnavailableError):
            refused()
    far.is_away = False
    assert value(vat.checkpointer, "new") is None
    put(vat.checkpointer, "new")
    assert value(vat.checkpointer, "new") == "value"


def test_a_process_that_cannot_reach_it_flushes_what_others_left(connect, postgres_url):
    vat = connect(Far())
    config = put(vat.checkpointer, "a", "x" * 20_000)
    step = checkpoint("x" * 20_001)
    vat.checkpointer.put(config, step | {"channel_versions": {"a": "2"}}, {"step": 1}, {"a": "2"})
    put(vat.checkpointer, "b")
    kill(vat.checkpointer)
    away = Far()
    away.is_away = True
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


@pytest.fixture
def serve(tmp_path) -> Iterator[Any]:
    made: list[subprocess.Popen[str]] = []

    def start(keyring: Keyring, path: Path = tmp_path / "s") -> subprocess.Popen[str]:
        keys = tmp_path / f"keys-{len(made)}"
        keyring.save(keys)
        command = [sys.executable, "-m", "langgraph_vat.kms", "--keys", keys, "--socket", path]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    vat = connect(SocketKeyWrapper(tmp_path / "s"))
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
    wrapper = SocketKeyWrapper(tmp_path / "s")
    wrapped = wrapper.wrap(b"secret", associated_data=b"")
    assert wrapper.unwrap(wrapped, associated_data=b"") == b"secret"


def test_a_second_key_server_leaves_the_first_one_alone(serve, tmp_path):
    serve(OLD)
    second = serve(BOTH)
    assert second.wait() == 2
    assert second.stderr.read().count("no socket can be made") == 1
    assert SocketKeyWrapper(tmp_path / "s").wrap(b"", associated_data=b"")


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


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("DisabledException", UnknownKeyError),
        ("AccessDeniedException", UnknownKeyError),
        ("IncorrectKeyException", SealError),
        ("ThrottlingException", UnavailableError),
    ],
)
def test_what_aws_kms_answers_is_an_error_of_ours(code, kind):
    from botocore.exceptions import ClientError

    class Client:
        def encrypt(self, **_: Any) -> Any:
            raise ClientError({"Error": {"Code": code, "Message": "of ada"}}, "Encrypt")

    with pytest.raises(kind) as refused:
        AwsKmsKeyWrapper("k", client=Client()).wrap(b"secret", associated_data=b"")
    assert refused.value.__context__ is None
    assert "ada" not in str(refused.value)


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
