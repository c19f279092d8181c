"""The sealing layer, as an attacker and as an auditor would look at it."""

import base64
import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Interrupt, Send

from langgraph_vat import (
    ConfigurationError,
    EncryptedSerializer,
    HybridSaver,
    Keyring,
    SealError,
    UnknownKeyError,
)
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.codec import SealedCodec
from langgraph_vat._seal.data_key import DataKey

PLACE = associated_data("a", "place")
VECTORS = json.loads((Path(__file__).parent / "wire" / "sealed-v1.json").read_text())


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_associated_data_is_injective(one, other):
    assert (associated_data(*one) == associated_data(*other)) == (one == other)


def test_every_flipped_bit_is_refused():
    key = DataKey.generate()
    sealed = key.seal(b"forty-two", associated_data=PLACE)
    for position in range(len(sealed) * 8):
        broken = bytearray(sealed)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(SealError):
            key.open(bytes(broken), associated_data=PLACE)


def test_truncated_extended_and_moved_messages_are_refused():
    key = DataKey.generate()
    sealed = key.seal(b"forty-two", associated_data=PLACE)
    for length in range(len(sealed)):
        with pytest.raises(SealError):
            key.open(sealed[:length], associated_data=PLACE)
    for wrong in (sealed + b"\0", b"", DataKey.generate().seal(b"x", associated_data=PLACE)):
        with pytest.raises(SealError):
            key.open(wrong, associated_data=PLACE)
    with pytest.raises(SealError):
        key.open(sealed, associated_data=associated_data("another", "place"))
    assert key.open(memoryview(sealed), associated_data=PLACE) == b"forty-two"


def test_a_value_is_bound_to_its_place_and_its_type():
    codec = SealedCodec(JsonPlusSerializer(), DataKey.generate(), "checkpoint", "t")
    for value in (None, b"x", bytearray(b"x"), [1], HumanMessage("hi"), Send("n", 1), Interrupt(1)):
        type_, data = codec.dump(value, "blob", "ns", "channel")
        assert codec.load(type_, data, "blob", "ns", "channel") == value
        with pytest.raises(SealError):
            codec.load(type_, data, "blob", "ns", "other")
    type_, data = codec.dump(b"x", "p")
    for relabelled in ("bytearray+aes256gcm", "msgpack+aes256gcm", "bytes", ""):
        with pytest.raises(SealError):
            codec.load(relabelled, data, "p")
    with pytest.raises(SealError):
        codec.load("msgpack", b"\x01", "p")


def test_rotation():
    old = Keyring.generate("k1")
    both = old.with_primary("k2")
    new = Keyring([("k2", base64.b64decode(both.export_secret_text().split()[0].split(":")[1]))])
    wrapped = {k.primary_id: k.wrap(b"secret", associated_data=PLACE) for k in (old, both)}
    assert both.key_ids == ("k2", "k1")
    assert [both.unwrap(w, associated_data=PLACE) for w in wrapped.values()] == [b"secret"] * 2
    assert new.unwrap(wrapped["k2"], associated_data=PLACE) == b"secret"
    with pytest.raises(UnknownKeyError, match="'k1'"):
        new.unwrap(wrapped["k1"], associated_data=PLACE)
    for position in range(len(wrapped["k1"]) * 8):
        broken = bytearray(wrapped["k1"])
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(SealError):
            old.unwrap(bytes(broken), associated_data=PLACE)


GOOD = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not set"),
        ("nokey", "id:base64"),
        ("k1:???", "k1.*base64"),
        ("k1:" + base64.b64encode(b"short").decode(), "k1.*5 bytes"),
        (f"k1:{GOOD},k1:{GOOD}", "two keys.*k1"),
        ("k1:" + base64.b64encode(bytes(32)).decode(), "k1.*repeated"),
        (f"bad id!:{GOOD}", "key id|id:base64"),
    ],
)
def test_unusable_keys_are_named_and_never_shown(monkeypatch, text, named):
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", text)
    with pytest.raises(ConfigurationError, match=named) as caught:
        Keyring.from_env()
    assert GOOD not in str(caught.value)


def test_keys_come_from_a_file_that_only_its_owner_may_read(tmp_path):
    path = tmp_path / "keys"
    keyring = Keyring.generate()
    keyring.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    wrapped = keyring.wrap(b"x", associated_data=PLACE)
    assert Keyring.from_file(path).unwrap(wrapped, associated_data=PLACE) == b"x"
    with pytest.raises(FileExistsError):
        keyring.save(path)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod"):
        Keyring.from_file(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Keyring.from_file(tmp_path / "missing")


def test_secrets_are_not_shown_copied_or_pickled():
    secret = bytes(range(1, 33))
    keyring, key = Keyring([("k1", secret)]), DataKey(b"12345678", secret)
    for holder in (keyring, key):
        shown = repr(holder) + str(holder) + repr(SimpleNamespace(x=holder))
        assert secret.hex() not in shown
        assert base64.b64encode(secret).decode() not in shown
        assert repr(secret) not in shown
        for take in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be copied"):
                take(holder)


def test_frozen_messages_open_for_ever():
    keyring = Keyring([("k1", bytes.fromhex(VECTORS["key"]))])
    place = associated_data(*VECTORS["parts"])
    assert place.hex() == VECTORS["associated_data"]
    key = DataKey.unwrap(bytes.fromhex(VECTORS["wrapped"]), keyring, associated_data=place)
    opened = key.open(bytes.fromhex(VECTORS["sealed"]), associated_data=place)
    assert opened == VECTORS["plaintext"].encode()
    serde = EncryptedSerializer(keyring)
    type_, message = VECTORS["serializer"]
    assert serde.loads_typed((type_, bytes.fromhex(message))) == VECTORS["plaintext"]


def test_the_format_as_documented_reads_the_frozen_messages():
    """docs/sealed-format.md, followed without our code."""
    parts = [part.encode() for part in VECTORS["parts"]]
    place = len(parts).to_bytes(4, "big")
    place += b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    wrapped = bytes.fromhex(VECTORS["wrapped"])
    header = wrapped[: 2 + wrapped[1]]
    nonce, body = wrapped[len(header) :][:12], wrapped[len(header) + 12 :]
    opened = AESGCM(bytes.fromhex(VECTORS["key"])).decrypt(nonce, body, header + place)
    key_id, secret = opened[:8], opened[8:]
    sealed = bytes.fromhex(VECTORS["sealed"])
    assert sealed[:10] == b"\x01\x01" + key_id
    plain = AESGCM(secret).decrypt(sealed[10:22], sealed[22:], sealed[:10] + place)
    assert plain.decode() == VECTORS["plaintext"]


def _graph(saver):
    builder = StateGraph(MessagesState)
    builder.add_node("reply", lambda s: {"messages": [("ai", str(len(s["messages"])))]})
    return builder.add_edge(START, "reply").compile(checkpointer=saver)


def _talk(saver):
    graph, config = _graph(saver), {"configurable": {"thread_id": "t"}}
    graph.invoke({"messages": [("user", "hello")]}, config)
    return [m.content for m in graph.invoke({"messages": [("user", "again")]}, config)["messages"]]


def test_the_serializer_serves_other_savers(postgres_url):
    keyring = Keyring.generate()
    expected = ["hello", "1", "again", "3"]
    assert _talk(InMemorySaver(serde=EncryptedSerializer(keyring))) == expected
    with PostgresSaver.from_conn_string(postgres_url) as saver:
        saver.serde = EncryptedSerializer(keyring)
        saver.setup()
        assert _talk(saver) == expected
        saver.serde = EncryptedSerializer(keyring)  # another process, the same keys
        assert len(list(saver.list(None))) == 6


def test_the_serializer_refuses_what_it_did_not_seal():
    keyring = Keyring.generate()
    serde = EncryptedSerializer(keyring)
    type_, data = serde.dumps_typed({"a": 1})
    assert type_ == "msgpack+aes256gcm"
    assert EncryptedSerializer(keyring).loads_typed((type_, data)) == {"a": 1}
    for wrong in (
        ("msgpack", b"\x01"),
        ("bytes+aes256gcm", data),
        (type_, data[:-1]),
        (type_, b""),
    ):
        with pytest.raises(SealError):
            serde.loads_typed(wrong)
    with pytest.raises(SealError):
        EncryptedSerializer(Keyring.generate()).loads_typed((type_, data))


def test_clones_with_an_allowlist_share_all_state(postgres_url):
    inner = JsonPlusSerializer(allowed_msgpack_modules=None)
    serde = EncryptedSerializer(Keyring.generate(), inner)
    with HybridSaver.from_conn_string(postgres_url, serde=serde) as saver:
        clone = saver.with_allowlist([("decimal", "Decimal"), ("mine", "Type")])
        assert clone is not saver
        assert clone.serde.keyring is saver.serde.keyring
        assert clone.stats is saver.stats
        assert _talk(clone) == ["hello", "1", "again", "3"]
        assert len(list(saver.list(None))) == 6
