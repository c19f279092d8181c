"""Values that are kept as patches: every state of a long history comes back as it was."""

import contextlib
import operator
import random
from typing import Annotated, Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, MessagesState, StateGraph

from langgraph_vat import HybridSaver, Keyring, SealError
from langgraph_vat._durable.packing import PATCH, line_position, pack, unpack

# --- bytes ---------------------------------------------------------------

_dice = random.Random(1)
TEXT = " ".join(_dice.choice(("alpha", "beta", "gamma", "delta")) + str(n) for n in range(2_000))
edits = st.lists(
    st.tuples(st.integers(0, 15_000), st.integers(0, 3_000), st.binary(max_size=300)), max_size=5
)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, cut, new in changes:
        data = data[:at] + new + data[at + cut :]
    return data


@given(st.one_of(st.binary(max_size=5_000), st.just(TEXT.encode())), edits)
def test_what_was_packed_is_unpacked(base, changes):
    value = edited(base, changes)
    for known in (None, base):
        type_, data = pack("msgpack", value, known)
        assert len(data) <= len(value)
        assert unpack(type_, data, known) == ("msgpack", value)


@pytest.mark.parametrize("size", [3_000_000])
def test_large_values_that_grow_cost_what_they_grow_by(size):
    base = random.Random(2).randbytes(size)
    counted = (size + 120).to_bytes(4) + base[4:]
    dated = b"".join(b"2026-11-21" + base[n + 10 : n + 50_000] for n in range(0, 500_000, 50_000))
    for value in (
        base + b"more" * 30,
        b"more" * 30 + base,
        counted + b"more" * 30,
        dated + base[500_000:] + b"more" * 5,
        base[: size // 2] + base[size // 2 + 9 :],
    ):
        type_, data = pack("bytes", value, base)
        assert type_ == "bytes" + PATCH
        assert len(data) < 400
        assert unpack(type_, data, base) == ("bytes", value)


@given(st.data())
def test_a_damaged_patch_or_another_base_is_refused(data):
    base = TEXT.encode()
    type_, patch = pack("msgpack", base + b"and more", base)
    assert type_.endswith(PATCH)
    at = data.draw(st.integers(0, len(patch) - 1))
    broken = patch[:at] + bytes([patch[at] ^ (1 << data.draw(st.integers(0, 7)))]) + patch[at + 1 :]
    with contextlib.suppress(SealError):
        assert unpack(type_, broken, base)[1] == base + b"and more"  # of no consequence
    for other in (None, b"", base[:-1], b"x" + base):
        with pytest.raises(SealError):
            unpack(type_, patch, other)


def test_no_value_is_far_from_a_whole_one():
    steps: dict[str, int] = {}
    step, line = 0, ["v0"]
    steps["v0"] = 0
    bases = {"v0": []}
    for number in range(1, 1_000):
        step, line = line_position(step, line)
        assert len(line) <= 8
        for at, version in enumerate(line):  # what a base builds on comes before it
            assert bases[version] == line[:at]
        name = f"v{number}"
        steps[name], bases[name] = step, line
        line = [*line, name]
    assert sorted(n for n in steps if steps[n] == 0) == ["v0", "v256", "v512", "v768"]


# --- savers --------------------------------------------------------------


@pytest.fixture(params=["plain", "sealed", "durable"])
def make(request, postgres_url, redis_url):
    keyring = Keyring.generate() if request.param == "sealed" else None
    made = []

    def one(**options: Any) -> HybridSaver:
        redis = None if request.param == "durable" else redis_url
        saver = HybridSaver.from_conn_string(postgres_url, redis=redis, keyring=keyring, **options)
        saver.setup()
        made.append(saver)
        return saver

    yield one
    for saver in made:
        saver.close()


def at(thread: str = "t", checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ""}
    return {"configurable": found | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def put(saver: Any, parent: Any, value: Any, version: str | None = None, **more: Any) -> Any:
    checkpoint = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": {"a": value}}
    checkpoint["channel_versions"] = {"a": version or saver.get_next_version(None, None)}
    versions = checkpoint["channel_versions"]
    return saver.put(parent or at(), checkpoint, {"step": 1, **more}, versions)


def grow(saver: Any, steps: int, config: Any = None) -> dict[str, Any]:
    """Put values that grow; return what each checkpoint must give back."""
    known = {}
    texts = [] if config is None else saver.get_tuple(config).checkpoint["channel_values"]["a"]
    for number in range(steps):
        texts = [*texts, f"message {number} {_dice.random()}" * 9]
        version = f"{number:032}.{_dice.random()}"
        config = put(saver, config, texts, version)
        saver.put_writes(config, [("a", [*texts, "next"]), ("b", "x" * 500)], "task")
        known[config["configurable"]["checkpoint_id"]] = texts
    return known


def are_as_they_were(saver: Any, known: dict[str, Any], thread: str = "t") -> bool:
    return all(_is_as_it_was(saver.get_tuple(at(thread, i)), known[i]) for i in known)


def _is_as_it_was(found: Any, value: Any) -> bool:
    writes = [("task", "a", [*value, "next"]), ("task", "b", "x" * 500)]
    return found.checkpoint["channel_values"]["a"] == value and found.pending_writes == writes


def stored(url: str) -> dict[str, Any]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT version, type, length(blob), vat_bases FROM checkpoint_blobs"
        ).fetchall()
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("flush_every", [1, 5])
def test_every_state_of_a_long_history_comes_back(make, postgres_url, flush_every):
    saver = make(flush_every=flush_every)
    known = grow(saver, 300)
    saver.flush()
    other = make()
    assert are_as_they_were(other, known)
    listed = {one.checkpoint["id"]: one for one in other.list(at())}
    assert all(_is_as_it_was(listed[i], known[i]) for i in known)
    rows = stored(postgres_url)
    assert sum(bases is None for _, _, bases in rows.values()) < 20
    assert sum(size for _, size, _ in rows.values()) < 100 * max(
        size for _, size, _ in rows.values()
    )


def test_the_head_that_redis_gets_is_whole(make, postgres_url):
    saver = make()
    known = grow(saver, 20)
    saver.flush()
    other = make()
    for _ in range(2):  # from Postgres, then from Redis
        newest = other.get_tuple(at())
        assert _is_as_it_was(newest, known[newest.checkpoint["id"]])
    more = grow(other, 3, newest.config)
    assert are_as_they_were(saver, known | more)


def test_what_kept_checkpoints_build_on_stays(make):
    saver = make(flush_every=1)
    known = grow(saver, 40)
    saver.prune(["t"])
    newest = max(known)
    assert [one.checkpoint["id"] for one in saver.list(at())] == [newest]
    assert are_as_they_were(make(), {newest: known[newest]})
    more = grow(saver, 5, saver.get_tuple(at()).config)
    assert are_as_they_were(make(), more)


def test_what_writes_build_on_stays_when_their_values_go(make, postgres_url):
    saver = make(flush_every=50, flush_after=600.0)
    known, config = {}, None
    for number in range(20):
        texts = _dice.choices(TEXT.split(), k=300)
        config = put(saver, config, texts, f"{2 * number:032}", run_id="r0")
        saver.put_writes(config, [("a", [*texts, "next"]), ("b", "x" * 500)], "task")
        known[config["configurable"]["checkpoint_id"]] = texts
        put(saver, config, [*texts, "next"], f"{2 * number + 1:032}", run_id="r1")
    saver.flush()
    saver.delete_for_runs(["r1"])
    assert are_as_they_were(make(), known)


def test_a_copy_is_equal_and_its_own(make):
    saver = make(flush_every=1)
    known = grow(saver, 40)
    saver.copy_thread("t", "u")
    saver.delete_thread("t")
    assert are_as_they_were(make(), known, "u")
    newest = saver.get_tuple(at("u"))
    put(saver, newest.config, ["another"])
    assert are_as_they_were(make(), known, "u")


def test_a_fork_builds_on_any_branch(make):
    saver = make(flush_every=1)
    known = grow(saver, 20)
    for checkpoint_id in sorted(known)[::5]:
        known |= grow(saver, 4, at("t", checkpoint_id))
    assert are_as_they_were(make(), known)


def test_a_flush_that_comes_twice_changes_nothing(make, postgres_url, monkeypatch):
    from langgraph_vat._ops import flush

    saver = make(flush_every=50, flush_after=600.0)
    if saver._life.connections._redis is None:
        return  # every step is committed as it comes
    known = grow(saver, 10)
    saver.flush()
    known |= grow(saver, 10, at("t", max(known)))
    kept = flush._trim

    async def lose(*_: Any) -> None:
        """The process dies between the commit and the trim."""

    monkeypatch.setattr(flush, "_trim", lose)
    saver.flush()
    before = stored(postgres_url)
    monkeypatch.setattr(flush, "_trim", kept)
    saver.flush()
    assert stored(postgres_url) == before
    assert are_as_they_were(make(), known)


@pytest.mark.parametrize("storage", ["compact", "compatible"])
@pytest.mark.parametrize("flush_every", [1, 50])
@pytest.mark.parametrize("chosen", [0, 7, 19])
@pytest.mark.parametrize("size", ["short", "long", "alike"])
def test_a_version_that_is_used_again_takes_nothing_with_it(
    make, flush_every, chosen, storage, size
):
    saver = make(flush_every=1)
    known = grow(saver, 20)
    reused = sorted(known)[chosen]
    versions = saver.get_tuple(at("t", reused)).checkpoint["channel_versions"]
    other = make(flush_every=flush_every, flush_after=600.0, storage=storage)
    newest = at("t", max(known))
    known |= grow(other, 3, newest)
    value: Any = {
        "short": "another value",
        "long": "another value " * 50,
        "alike": [*known[max(known)], "and one more"],
    }[size]
    put(other, at("t", max(known)), "another value " * 70, versions["a"])
    config = put(other, at("t", max(known)), value, versions["a"])
    known.pop(reused)  # its value is another one now, too
    known |= grow(other, 20, at("t", max(known)))
    other.flush()
    assert other.get_tuple(config).checkpoint["channel_values"] == {"a": value}
    assert are_as_they_were(make(), known)


def test_a_damaged_base_keeps_no_other_thread_from_being_flushed(make, postgres_url, monkeypatch):
    from langgraph_vat._ops import flush

    saver = make(flush_every=50, flush_after=600.0)
    if saver._life.connections._redis is None:
        return
    known = grow(saver, 10)

    async def lose(*_: Any) -> None:
        """The process dies between the commit and the trim."""

    with monkeypatch.context() as patched:
        patched.setattr(flush, "_trim", lose)
        saver.flush()
    with psycopg.connect(postgres_url) as connection:
        connection.execute("SET langgraph_vat.writer = 'hot'")
        connection.execute("UPDATE checkpoint_blobs SET blob = NULL WHERE vat_bases IS NULL")
    config = saver.put(at("u"), empty_checkpoint(), {"step": 1}, {})
    saver.flush()
    assert saver.get_tuple(config) is not None
    assert len(list(saver.list(at()))) == len(known)


def test_values_of_postgres_saver_are_built_on(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as theirs:
        theirs.setup()
        known = grow(theirs, 3)
    with HybridSaver.from_conn_string(postgres_url) as saver:
        known |= grow(saver, 10, saver.get_tuple(at()).config)
        assert are_as_they_were(saver, known)
    assert sum(PATCH in type_ for type_, _, _ in stored(postgres_url).values()) >= 8


def test_whoever_lacks_the_key_stores_values_whole(postgres_url, redis_url):
    keyring = Keyring.generate()
    options: Any = {"redis": redis_url, "keyring": keyring, "flush_every": 50, "flush_after": 600.0}
    with HybridSaver.from_conn_string(postgres_url, **options) as saver:
        known = grow(saver, 10)
        other = HybridSaver.from_conn_string(postgres_url, **options)
        other.flush()
        assert not any(PATCH in type_ for type_, _, _ in stored(postgres_url).values())
        known |= grow(saver, 10, saver.get_tuple(at()).config)
        saver.flush()
        assert are_as_they_were(other, known)
        other.close()
    assert any(PATCH in type_ for type_, _, _ in stored(postgres_url).values())


def test_what_builds_on_a_changed_value_is_refused(postgres_url):
    with HybridSaver.from_conn_string(postgres_url) as saver:
        known = grow(saver, 10)
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "UPDATE checkpoint_blobs SET type = 'bytes', blob = '\\xa0' WHERE vat_bases IS NULL"
            )
        with pytest.raises(SealError, match="builds on"):
            saver.get_tuple(at("t", max(known)))
        # A new step is not held up by that: it is stored whole.
        config = put(saver, at("t", max(known)), ["new"] * 200)
        assert saver.get_tuple(config).checkpoint["channel_values"]["a"] == ["new"] * 200


def test_compatible_storage_reads_both_and_writes_plain(make, postgres_url):
    saver = make(flush_every=1)
    known = grow(saver, 5)
    plain = make(flush_every=1, storage="compatible")
    before = stored(postgres_url)
    known |= grow(plain, 5, plain.get_tuple(at()).config)
    assert are_as_they_were(saver, known)
    new = stored(postgres_url).keys() - before.keys()
    assert len(new) == 5
    assert not any("+vat" in stored(postgres_url)[version][0] for version in new)


class State(MessagesState):
    log: Annotated[list[str], operator.add]


def test_a_graphs_history_is_that_of_in_memory_saver(make):
    def run(saver: Any) -> list[Any]:
        builder = StateGraph(State)
        builder.add_node(
            "say",
            lambda s: {
                "messages": [AIMessage("y" * 300, id=f"a{len(s['log'])}")],
                "log": ["z" * 300],
            },
        )
        builder.add_edge(START, "say")
        graph = builder.compile(checkpointer=saver)
        for number in range(12):
            graph.invoke({"messages": [HumanMessage("x" * 300, id=f"h{number}")], "log": []}, at())
        return [
            (one.values, one.next, one.metadata["step"]) for one in graph.get_state_history(at())
        ]

    assert run(make()) == run(InMemorySaver())
