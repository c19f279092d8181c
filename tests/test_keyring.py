"""A keyring opens what its keys wrapped, refuses all else, and never shows a key."""

import base64
import copy
import io
import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback

import pytest

from langgraph_vat import Keyring
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import ConfigurationError, SealError, UnknownKeyError

K1, K2 = bytes(range(32)), bytes(range(100, 132))
SECRET, PLACE = b"a secret", b"a place"


def text_of(key: bytes) -> str:
    return base64.b64encode(key).decode()


def shows(text: str, key: bytes = K1) -> bool:
    """Whether any eight bytes of a key appear, raw, as hex, as base64, or in a repr."""
    forms = [key.hex(), text_of(key), repr(key)[2:-1], key.decode("latin-1")]
    return any(form[i : i + 16] in text for form in forms for i in range(0, len(form) - 15, 8))


def test_the_search_for_a_key_finds_one():
    for text in (K1.hex(), text_of(K1), str(K1), str([("k1", K1)]), text_of(K1)[:32]):
        assert shows(text)


# --- wrapping ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 40, 5_000])
def test_what_was_wrapped_opens(size):
    ring, secret = Keyring.generate(), os.urandom(size)
    wrapped = ring.wrap(secret, associated_data=PLACE)
    assert ring.unwrap(wrapped, associated_data=PLACE) == secret
    assert ring.unwrap(memoryview(wrapped), associated_data=PLACE) == secret
    assert ring.wrap(secret, associated_data=PLACE) != wrapped


def test_every_changed_bit_and_length_is_refused():
    ring = Keyring([("k1", K1)])
    wrapped = ring.wrap(SECRET, associated_data=PLACE)
    changed = [
        (int.from_bytes(wrapped) ^ (1 << bit)).to_bytes(len(wrapped))
        for bit in range(len(wrapped) * 8)
    ]
    changed += [wrapped[:end] for end in range(len(wrapped))]
    changed += [wrapped[start:] for start in range(1, len(wrapped))]
    changed += [wrapped + b"\0", b"\0" + wrapped, wrapped + wrapped]
    for message in changed:
        with pytest.raises(SealError):
            ring.unwrap(message, associated_data=PLACE)


def test_a_secret_opens_only_where_it_was_wrapped():
    ring = Keyring.generate()
    wrapped = ring.wrap(SECRET, associated_data=PLACE)
    for other in (b"", PLACE[:-1], PLACE + b"\0", b"k1" + PLACE):
        with pytest.raises(SealError, match="belongs elsewhere"):
            ring.unwrap(wrapped, associated_data=other)


def test_two_keys_with_one_id_are_two_keys():
    wrapped = Keyring([("k1", K1)]).wrap(SECRET, associated_data=PLACE)
    with pytest.raises(SealError):
        Keyring([("k1", K2)]).unwrap(wrapped, associated_data=PLACE)


# --- rotation ---------------------------------------------------------------------

OLD = Keyring([("k1", K1)])
BOTH = OLD.with_key("k2", K2).with_primary("k2")
NEW = Keyring([("k2", K2)])


@pytest.mark.parametrize(
    ("writer", "readers", "strangers"),
    [(OLD, (OLD, BOTH), (NEW,)), (BOTH, (BOTH, NEW), (OLD,)), (NEW, (BOTH, NEW), (OLD,))],
)
def test_rotation(writer, readers, strangers):
    wrapped = writer.wrap(SECRET, associated_data=PLACE)
    for ring in readers:
        assert ring.unwrap(wrapped, associated_data=PLACE) == SECRET
    for ring in strangers:
        with pytest.raises(UnknownKeyError, match=repr(writer.primary_id)):
            ring.unwrap(wrapped, associated_data=PLACE)


def test_a_new_primary_leaves_the_old_keyring_as_it_was():
    assert (OLD.primary_id, OLD.key_ids) == ("k1", ("k1",))
    assert (BOTH.primary_id, BOTH.key_ids) == ("k2", ("k2", "k1"))
    with pytest.raises(ConfigurationError, match="two keys with the id 'k1'"):
        BOTH.with_key("k1", K2)


def test_a_primary_key_that_is_not_there_is_a_mistake_and_no_new_key():
    with pytest.raises(ConfigurationError, match=r"no key 'k22'; it has k2, k1.*with_key"):
        BOTH.with_primary("k22")
    for refused in (BOTH.with_primary, BOTH.without):
        with pytest.raises(ConfigurationError) as raised:
            refused(f"k2:{text_of(K2)}")
        assert not shows(str(raised.value), K2)


def test_keys_come_behind_go_in_front_and_leave():
    ring = OLD.with_key("k2", K2)
    assert (ring.primary_id, ring.key_ids) == ("k1", ("k1", "k2"))
    wrapped = ring.with_primary("k2").wrap(SECRET, associated_data=PLACE)
    assert ring.with_primary("k2").key_ids == ("k2", "k1")
    assert ring.unwrap(wrapped, associated_data=PLACE) == SECRET
    assert ring.without("k1").unwrap(wrapped, associated_data=PLACE) == SECRET
    with pytest.raises(ConfigurationError, match="no key 'k9'"):
        ring.without("k9")
    with pytest.raises(ConfigurationError, match="empty"):
        OLD.without("k1")
    with pytest.raises(ConfigurationError, match="two keys"):
        ring.with_key("k2")
    assert OLD.with_key("k3").key_ids == ("k1", "k3")


# --- from text ----------------------------------------------------------------------

GOOD = f"k1:{text_of(K1)}"
BAD = {
    "15 bytes": f"k1:{text_of(K1[:15])}",
    "33 bytes": f"k1:{text_of(K1 + b'x')}",
    "as hex": f"k1:{K1.hex()}",
    "one byte": "k1:" + text_of(bytes(32)),
    "no padding": GOOD.rstrip("="),
    "a character too much": f"k1:!{text_of(K1)}",
    "not ASCII": f"k1:\u00e9{text_of(K1)}",
    "no key": "k1:",
    "another colon": f"k1:k1:{text_of(K1)}",
    "twice": f"{GOOD},{GOOD}",
}
NAMELESS = {
    "no id": text_of(K1),
    "empty id": f":{text_of(K1)}",
    "id and key swapped": f"{text_of(K1)}:k1",
    "id and key swapped, without padding": f"{text_of(K1).rstrip('=')}:k1",
    "id of 33": f"{'x' * 33}:{text_of(K1)}",
    "odd id": f"k.1:{text_of(K1)}",
    "blank": " \n",
    "only a comma": ",",
}


def everything(error: BaseException) -> str:
    """Return an error, what led to it, and the variables of all frames but the tests' own."""
    parts, errors = [], [error]
    while errors:
        one = errors.pop()
        parts.append(repr(one))
        errors += [other for other in (one.__cause__, one.__context__) if other is not None]
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if frame.f_code.co_filename != __file__:
                parts.append(repr(frame.f_locals))
    return "".join(parts)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    return path


@pytest.mark.parametrize("text", [*BAD.values(), *NAMELESS.values()], ids=[*BAD, *NAMELESS])
@pytest.mark.parametrize("source", ["environment", "file"])
def test_an_unusable_key_is_named_and_not_shown(monkeypatch, key_file, source, text):
    monkeypatch.setenv("KEYS", text)
    key_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as raised:
        Keyring.from_env("KEYS") if source == "environment" else Keyring.from_file(key_file)
    assert not shows(everything(raised.value))
    assert ("'k1'" in str(raised.value)) == (text in BAD.values())


def test_a_missing_or_empty_source_is_refused(monkeypatch, tmp_path, key_file):
    monkeypatch.delenv("LANGGRAPH_VAT_KEYS", raising=False)
    with pytest.raises(ConfigurationError, match="LANGGRAPH_VAT_KEYS is not set"):
        Keyring.from_env()
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", "")
    with pytest.raises(ConfigurationError, match="LANGGRAPH_VAT_KEYS is empty"):
        Keyring.from_env()
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            Keyring.from_file(path)
    with pytest.raises(ConfigurationError, match="empty"):
        Keyring.from_file(key_file)
    with pytest.raises(ConfigurationError, match="empty"):
        Keyring([])


@pytest.mark.parametrize("mode", [0o604, 0o606, 0o602, 0o644, 0o777, 0o640, 0o660, 0o620])
def test_a_file_open_to_the_group_or_others_is_refused_with_the_remedy(key_file, mode):
    key_file.write_text(GOOD)
    key_file.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600") as caught:
        Keyring.from_file(key_file)
    subprocess.run(str(caught.value).partition("Run: ")[2], shell=True, check=True)
    assert Keyring.from_file(key_file).key_ids == ("k1",)


@pytest.mark.parametrize(
    ("mode", "is_read"), [(0o440, True), (0o640, True), (0o460, False), (0o644, False)]
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to root")
def test_a_secret_of_roots_may_be_read_by_its_group(key_file, monkeypatch, mode, is_read):
    key_file.write_text(GOOD)
    key_file.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if is_read:
        assert Keyring.from_file(key_file).key_ids == ("k1",)
    else:
        with pytest.raises(ConfigurationError, match="chmod 640"):
            Keyring.from_file(key_file)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_the_owner_is_read(key_file, mode):
    key_file.write_text(GOOD)
    key_file.chmod(mode)
    assert Keyring.from_file(key_file).key_ids == ("k1",)


@pytest.mark.parametrize("between", [",", " ", "\n", ",\n", " , ", "\r\n"])
def test_keys_are_separated_by_commas_or_white_space(monkeypatch, between):
    monkeypatch.setenv("KEYS", f"{GOOD}{between}k2:{text_of(K2)}{between}")
    assert Keyring.from_env("KEYS").key_ids == ("k1", "k2")


def test_a_saved_keyring_is_the_owners_alone_and_comes_back(tmp_path):
    path = tmp_path / "keys"
    BOTH.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = Keyring.from_file(path)
    assert again.key_ids == BOTH.key_ids
    assert again.export_secret_text() == BOTH.export_secret_text()
    with pytest.raises(ConfigurationError, match="not overwritten"):
        OLD.save(path)
    for nowhere in (tmp_path / "absent" / "keys", path / "keys"):
        with pytest.raises(ConfigurationError, match=r"were not saved.*directory that exists"):
            OLD.save(nowhere)
    assert Keyring.from_file(path).key_ids == BOTH.key_ids


FULL = """
import resource, sys
from pathlib import Path
from langgraph_vat import ConfigurationError, Keyring

ring = Keyring.generate()
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # bytes
try:
    ring.save(sys.argv[1])
except ConfigurationError as error:
    print(error)
"""


def test_of_a_keyring_that_cannot_be_written_nothing_is_left(tmp_path):
    path = tmp_path / "keys"
    command = [sys.executable, "-c", FULL, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "were not saved" in done.stdout
    assert list(tmp_path.iterdir()) == []
    OLD.save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_keyring_has_its_name_once_it_is_on_disk(tmp_path, monkeypatch):
    path, synced = tmp_path / "keys", []

    def fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_directory, os.fstat(descriptor).st_size > 40, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    OLD.save(path)
    assert [(one[0], one[2]) for one in synced] == [(False, False), (True, True)]
    assert synced[0][1]

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ConfigurationError, match="Input/output error"):
        OLD.save(tmp_path / "others")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "keys",
    [5, None, ["k1"], [("k1",)], [("k1", K1, K2)], [(5, K1)], [(K1, "k1")], {"k1": K1}, [None]],
)
def test_what_are_no_pairs_of_id_and_key_is_refused(keys):
    with pytest.raises(ConfigurationError) as raised:
        Keyring(keys)
    assert not shows(everything(raised.value))


@pytest.mark.parametrize(
    "refused",
    [
        lambda: OLD.with_key("k1"),
        lambda: OLD.with_key("k2", b"short"),
        lambda: OLD.with_key(["k2"]),
        lambda: OLD.with_cipher("rot13"),
        lambda: OLD.without("k1"),
        lambda: OLD.with_primary("k2"),
        lambda: Keyring([("k1", K1), ("k1", K1)]),
        lambda: Keyring([("k1", K1), ("k2", b"short")]),
    ],
)
def test_a_mistake_shows_no_key_even_with_the_variables_of_its_frames(refused):
    with pytest.raises(ConfigurationError) as raised:
        refused()
    assert not shows(everything(raised.value))


@pytest.mark.parametrize("key", [K1[:31], K1 + b"x", b"", text_of(K1), list(K1), memoryview(K1)])
def test_a_key_is_32_bytes(key):
    with pytest.raises(ConfigurationError, match="'k1'") as raised:
        Keyring([("k1", key)])
    assert not shows(str(raised.value))


# --- silence ------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [OLD, BOTH, DataKey([b"\x0112345678" + K1])], ids=str)
def test_a_secret_cannot_be_printed_copied_or_pickled(secret):
    stream = io.StringIO()
    logger = logging.getLogger("silence")
    logger.addHandler(logging.StreamHandler(stream))
    logger.error("%s %r", secret, secret)
    shown = stream.getvalue() + f"{secret} {secret!r} {[secret]} { {'a': secret} }"
    assert not shows(shown)
    assert not hasattr(secret, "__dict__")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(secret, protocol)
    for copying in (copy.copy, copy.deepcopy, type(secret).__getstate__):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copying(secret)


def test_a_refusal_shows_no_key_even_with_the_variables_of_its_frames():
    wrapped = OLD.wrap(SECRET, associated_data=PLACE)
    data_key = DataKey([b"\x0112345678" + K1])
    sealed = data_key.seal(SECRET, associated_data=PLACE)

    def refusals():
        yield lambda: NEW.unwrap(wrapped, associated_data=PLACE)
        yield lambda: OLD.unwrap(wrapped, associated_data=b"")
        yield lambda: DataKey.unwrap(wrapped, OLD, associated_data=PLACE)
        yield lambda: data_key.open(sealed, associated_data=b"")

    for refuse in refusals():
        with pytest.raises(SealError) as raised:
            refuse()
        assert not shows(everything(raised.value))
