"""A sealed value opens at its place and nowhere else; what was sealed once opens for ever."""

import hashlib
import hmac
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_vat import Keyring
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat._seal.blind_index import IndexKey
from langgraph_vat._seal.codec import PlainCodec, SealedCodec, opened_type
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import SealError, UnknownKeyError
from langgraph_vat.serde import EncryptedSerializer

PATHS = sorted((Path(__file__).parent / "wire").glob("sealed-*.json"))
FILES = [json.loads(path.read_text()) for path in PATHS]
WIRE = [{"cipher": "aes256gcm", **m, "keys": f["keys"]} for f in FILES for m in f["messages"]]
PLACE = ("blob", "", "messages", "1")
BASE = ("checkpoint", "t", "g")
text = st.text(st.characters(), max_size=6)
part = st.one_of(text, text.map("\0\0\0\1".__add__), st.binary(max_size=6))
parts = st.lists(part, max_size=5)


def as_bytes(values):
    return [v.encode(errors="surrogatepass") if isinstance(v, str) else v for v in values]


# --- associated data ----------------------------------------------------------------


def decoded(data: bytes) -> list[bytes]:
    """Invert the encoding: only an injective one has an inverse."""
    count, data, found = int.from_bytes(data[:4]), data[4:], []
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4])
        found.append(data[4:end])
        data = data[end:]
    assert not data
    return found


@given(parts)
def test_associated_data_can_be_inverted(values):
    assert decoded(associated_data(*values)) == as_bytes(values)


@given(parts, parts)
def test_associated_data_is_injective(one, other):
    same = as_bytes(one) == as_bytes(other)
    assert (associated_data(*one) == associated_data(*other)) == same


@given(parts, st.integers(0, 5), part)
def test_parts_do_not_run_into_each_other(values, position, other):
    position = min(position, len(values))
    longer = [*values[:position], other, *values[position:]]
    assert associated_data(*longer) != associated_data(*values)
    assert not associated_data(*longer).startswith(associated_data(*values))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("a",)),
        ((), ("",)),
        (("a\0b",), ("a", "b")),
        (("\ud800",), ("?",)),
        (("e\u0301",), ("\u00e9",)),
    ],
)
def test_places_that_look_alike_are_different(one, other):
    assert associated_data(*one) != associated_data(*other)


# --- messages -----------------------------------------------------------------------


@given(st.binary(max_size=300), parts)
def test_what_was_sealed_opens(plaintext, place):
    key, bound = DataKey.generate(), associated_data(*place)
    sealed = key.seal(plaintext, associated_data=bound)
    for form in (sealed, bytearray(sealed), memoryview(sealed)):
        assert key.open(form, associated_data=bound) == plaintext
    assert len(sealed) == len(plaintext) + 38
    with pytest.raises(SealError):
        key.open(sealed, associated_data=bound + b"\0")


@pytest.mark.parametrize("plaintext", [b"", b"short", bytes(64)])
def test_every_changed_bit_and_length_is_refused(plaintext):
    key = DataKey.generate()
    sealed = key.seal(plaintext, associated_data=b"here")
    changed = [
        (int.from_bytes(sealed) ^ (1 << bit)).to_bytes(len(sealed))
        for bit in range(len(sealed) * 8)
    ]
    changed += [sealed[:end] for end in range(len(sealed))]
    changed += [sealed[start:] for start in range(1, len(sealed))]
    changed += [sealed + b"\0", b"\0" + sealed, sealed + sealed]
    for message in changed:
        with pytest.raises(SealError):
            key.open(message, associated_data=b"here")


@given(st.binary(max_size=120))
def test_noise_is_refused(noise):
    key, ring = DataKey.generate(), Keyring.generate()
    with pytest.raises(SealError):
        key.open(noise, associated_data=b"")
    with pytest.raises(SealError):
        ring.unwrap(b"\x01\x02k1" + noise, associated_data=b"")
    with pytest.raises(SealError):
        EncryptedSerializer(ring).loads_typed(("msgpack+aes256gcm", noise))


def test_no_two_messages_share_a_nonce_or_an_id():
    key = DataKey.generate()
    messages = [key.seal(b"same", associated_data=b"same") for _ in range(2_000)]
    assert len({m[10:22] for m in messages}) == len({m[22:] for m in messages}) == 2_000
    assert {m[:10] for m in messages} == {messages[0][:10]}
    assert DataKey.generate().seal(b"", associated_data=b"")[2:10] != messages[0][2:10]


def test_another_key_refuses_even_under_the_same_id():
    sealed = DataKey([b"\x0112345678" + os.urandom(32)]).seal(b"x", associated_data=b"")
    with pytest.raises(SealError):
        DataKey([b"\x0112345678" + os.urandom(32)]).open(sealed, associated_data=b"")


def test_a_data_key_opens_only_where_it_was_wrapped():
    ring, key = Keyring.generate(), DataKey.generate()
    wrapped = key.wrap(ring, associated_data=b"thread 1")
    again = DataKey.unwrap(wrapped, ring, associated_data=b"thread 1")
    sealed = key.seal(b"x", associated_data=b"")
    assert again.open(sealed, associated_data=b"") == b"x"
    with pytest.raises(SealError):
        DataKey.unwrap(wrapped, ring, associated_data=b"thread 2")
    with pytest.raises(UnknownKeyError, match="'k1'"):
        DataKey.unwrap(wrapped, Keyring.generate("k2"), associated_data=b"thread 1")
    for other in (b"", b"x" * 39, b"x" * 41):
        stranger = ring.wrap(other, associated_data=b"thread 1")
        with pytest.raises(SealError):
            DataKey.unwrap(stranger, ring, associated_data=b"thread 1")


# --- places -------------------------------------------------------------------------


def codec(key: DataKey, *base: str) -> SealedCodec:
    return SealedCodec(JsonPlusSerializer(), key, *(base or BASE))


def test_a_value_moved_relabelled_or_laid_bare_is_refused():
    key = DataKey.generate()
    one = codec(key)
    type_, data = one.dump("hello", *PLACE)
    assert (type_, one.load(type_, data, *PLACE)) == ("msgpack+aes256gcm", "hello")
    moved = [
        ("blob", "", "messages", "2"),
        ("blob", "", "message", "s1"),
        ("blob", "inner", "messages", "1"),
        ("write", "", "messages", "1"),
        PLACE[:-1],
        (*PLACE, ""),
        (),
    ]
    for place in moved:
        with pytest.raises(SealError):
            one.load(type_, data, *place)
    for base in (("checkpoint", "u", "g"), ("checkpoint", "t", "h"), ("item", "t", "g")):
        with pytest.raises(SealError):
            codec(key, *base).load(type_, data, *PLACE)
    labels = ["null", "bytes", "json", "pickle", "", "\ud800", "msgpack+aes256gcm"]
    for label in labels:
        with pytest.raises(SealError):
            one.load(label + "+aes256gcm", data, *PLACE)
    for label in [*labels[:-1], "msgpack", "aes256gcm", "+AES256GCM", "msgpack+aes256gcm ", None]:
        with pytest.raises(SealError, match="must be sealed"):
            one.load(label, data, *PLACE)
    with pytest.raises(SealError):
        one.load(type_, None, *PLACE)


def test_plaintext_is_refused_before_it_is_parsed():
    class Alarm(JsonPlusSerializer):
        def loads_typed(self, data):
            raise AssertionError("parsed what nobody authenticated")

    sealed = SealedCodec(Alarm(), DataKey.generate(), *BASE)
    for type_, data in [("msgpack", b"\xc0"), ("msgpack+aes256gcm", b"\xc0" * 64)]:
        with pytest.raises(SealError):
            sealed.load(type_, data, *PLACE)
        with pytest.raises(SealError):
            EncryptedSerializer(Keyring.generate(), Alarm()).loads_typed((type_, data))


def test_without_a_keyring_sealed_data_is_said_to_be_sealed():
    plain = PlainCodec(JsonPlusSerializer())
    assert plain.load(*plain.dump([1, "a"], *PLACE), "elsewhere") == [1, "a"]
    with pytest.raises(SealError, match="no keyring"):
        plain.load(*codec(DataKey.generate()).dump("a", *PLACE), *PLACE)


def test_a_type_below_the_seal_is_what_stands_before_one_suffix():
    assert opened_type("a+aes256gcm+aes256gcm", b"\1\1") == "a+aes256gcm"
    assert opened_type("+aes256gcm", b"\1\1") == ""


# --- the wire -----------------------------------------------------------------------
#
# Below, docs/sealed-format.md is implemented again with nothing of ours.


def documented_associated_data(*values: str) -> bytes:
    encoded = [value.encode() for value in values]
    pieces = [len(value).to_bytes(4, "big") + value for value in encoded]
    return len(encoded).to_bytes(4, "big") + b"".join(pieces)


CIPHERS = {1: (AESGCM, "+aes256gcm"), 2: (ChaCha20Poly1305, "+chacha20poly1305")}
DataKeys = dict[bytes, bytes]
"""Keys by what their messages begin with; the one that seals first."""


def documented_unwrap(keys: dict[str, str], wrapped: bytes, place: bytes) -> DataKeys:
    assert wrapped[0] == 1
    header = wrapped[: 2 + wrapped[1]]
    key = bytes.fromhex(keys[header[2:].decode("ascii")])
    nonce, body = wrapped[len(header) : len(header) + 12], wrapped[len(header) + 12 :]
    opened = AESGCM(key).decrypt(nonce, body, header + place)
    if len(opened) % 2 == 0:
        records = [(1, opened[at : at + 40]) for at in range(0, len(opened), 40)]
    else:
        assert opened[0] == 2
        records = [
            (int.from_bytes(opened[at : at + 2], "big"), opened[at + 2 : at + 42])
            for at in range(1, len(opened), 42)
        ]
    assert all(len(record) == 40 for _, record in records)
    return {bytes([1, cipher]) + record[:8]: record[8:] for cipher, record in records}


def documented_wrap(keys: dict[str, str], key_id: str, data_keys: DataKeys, place: bytes) -> bytes:
    records = [(header[1], header[2:] + key) for header, key in data_keys.items()]
    plain = b"".join(record for _, record in records)
    if any(cipher != 1 for cipher, _ in records):
        parts = (cipher.to_bytes(2, "big") + record for cipher, record in records)
        plain = b"\x02" + b"".join(parts)
    header = bytes([1, len(key_id)]) + key_id.encode("ascii")
    nonce = os.urandom(12)
    return (
        header + nonce + AESGCM(bytes.fromhex(keys[key_id])).encrypt(nonce, plain, header + place)
    )


def documented_open(data_keys: DataKeys, type_: str, sealed: bytes, place: bytes) -> bytes:
    header, nonce, body = sealed[:10], sealed[10:22], sealed[22:]
    cipher, suffix = CIPHERS[header[1]]
    assert header[0] == 1
    assert type_.endswith(suffix)
    return cipher(data_keys[header]).decrypt(nonce, body, header + place)


def documented_seal(
    data_keys: DataKeys, type_: str, plain: bytes, place: bytes
) -> tuple[str, bytes]:
    header, key = next(iter(data_keys.items()))
    cipher, suffix = CIPHERS[header[1]]
    nonce = os.urandom(12)
    return type_ + suffix, header + nonce + cipher(key).encrypt(nonce, plain, header + place)


@pytest.fixture(params=WIRE, ids=lambda message: message["name"])
def frozen(request):
    return request.param


def opened_here(frozen: dict[str, Any], type_: str, sealed: bytes, wrapped: bytes) -> Any:
    ring = Keyring((key_id, bytes.fromhex(key)) for key_id, key in frozen["keys"].items())
    if frozen["name"].startswith("serializer"):
        return EncryptedSerializer(ring, _Bare()).loads_typed((type_, sealed))
    bound = associated_data(*frozen["key_place"])
    one = SealedCodec(
        _Bare(), DataKey.unwrap(wrapped, ring, associated_data=bound), *frozen["base"]
    )
    return one.load(type_, sealed, *frozen["place"])


def test_frozen_messages_open_for_ever(frozen):
    sealed, wrapped = bytes.fromhex(frozen["sealed"]), bytes.fromhex(frozen["wrapped_key"])
    tag = frozen["type"] + "+" + frozen["cipher"]
    plaintext = bytes.fromhex(frozen["plaintext"])
    assert opened_here(frozen, tag, sealed, wrapped) == (frozen["type"], plaintext)
    for other in CIPHERS.values():
        if not tag.endswith(other[1]):
            with pytest.raises(SealError):
                opened_here(frozen, frozen["type"] + other[1], sealed, wrapped)


def test_the_documented_format_opens_frozen_messages_and_makes_others(frozen):
    key_place = documented_associated_data(*frozen["key_place"])
    place = documented_associated_data(*frozen["base"], *frozen["place"], frozen["type"])
    sealed, wrapped = bytes.fromhex(frozen["sealed"]), bytes.fromhex(frozen["wrapped_key"])
    is_serializer = frozen["name"].startswith("serializer")
    if is_serializer:
        end = 2 + int.from_bytes(sealed[:2], "big")
        assert sealed[2:end] == wrapped
        sealed = sealed[end:]
    keys = documented_unwrap(frozen["keys"], wrapped, key_place)
    tag = frozen["type"] + "+" + frozen["cipher"]
    assert documented_open(keys, tag, sealed, place).hex() == frozen["plaintext"]
    type_, again = documented_seal(keys, frozen["type"], b"another", place)
    wrapped = documented_wrap(frozen["keys"], list(frozen["keys"])[-1], keys, key_place)
    if is_serializer:
        again = len(wrapped).to_bytes(2, "big") + wrapped + again
    assert opened_here(frozen, type_, again, wrapped) == (frozen["type"], b"another")


@pytest.mark.parametrize("cipher", ["aes256gcm", "chacha20poly1305"])
def test_what_we_seal_today_is_the_documented_format(cipher):
    ring, secret = Keyring([("k1", bytes(range(32)))]), bytes(range(32)).hex()
    key = DataKey.generate().renewed(cipher)
    wrapped = key.wrap(ring, associated_data=associated_data("data key", "store", "users"))
    type_, sealed = codec(key, "item", "users").dump(b"\xff", "users.u1", "k")
    keys = documented_unwrap(
        {"k1": secret}, wrapped, documented_associated_data("data key", "store", "users")
    )
    assert len(keys) == 2
    place = documented_associated_data("item", "users", "users.u1", "k", "bytes")
    assert type_ == f"bytes+{cipher}"
    assert documented_open(keys, type_, sealed, place) == b"\xff"


BLIND = json.loads((Path(__file__).parent / "wire" / "blind-v1.json").read_text())


def documented_token(key: bytes, where: list[str], field: str, value: Any) -> str | None:
    if value is None or isinstance(value, list | dict):
        return None
    if isinstance(value, str):
        kind, shown = "string", value
    elif value == int(value):
        number = int(value)
        kind, shown = "integer", ("-" if number < 0 else "") + f"{abs(number):x}"
    else:
        kind, shown = "float", struct.pack(">d", value).hex()
    encoded = [
        part.encode(errors="surrogatepass") for part in ("blind index", *where, field, kind, shown)
    ]
    pieces = [len(part).to_bytes(4, "big") + part for part in encoded]
    message = len(encoded).to_bytes(4, "big") + b"".join(pieces)
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


@pytest.mark.parametrize("frozen", BLIND["tokens"], ids=lambda one: ascii(one["value"])[:20])
def test_frozen_tokens_are_the_documented_ones_and_ours(frozen):
    key = bytes.fromhex(BLIND["key"])
    where, field, value = frozen["where"], frozen["field"], frozen["value"]
    assert documented_token(key, where, field, value) == frozen["token"]
    ours = IndexKey(key).tokens({field: value}, [field], *where)
    assert ours == {field: frozen["token"]}


def test_the_documented_index_key_is_the_one_we_wrap():
    secret = bytes(range(32))
    keys = {"k1": secret.hex()}
    place = documented_associated_data("index key", "store")
    wrapped = IndexKey(secret).wrap(Keyring([("k1", secret)]), associated_data=place)
    header = wrapped[: 2 + wrapped[1]]
    key = bytes.fromhex(keys[header[2:].decode("ascii")])
    nonce, body = wrapped[len(header) : len(header) + 12], wrapped[len(header) + 12 :]
    assert AESGCM(key).decrypt(nonce, body, header + place) == secret


class _Bare:
    """A serializer that shows what it is given."""

    def dumps_typed(self, obj):
        return obj

    def loads_typed(self, data):
        return data
