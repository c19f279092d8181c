"""
Specs of our own for checkpoint savers, where LangGraph's suite is silent.

Written like the suite's: plain coroutines that take a saver and assert.
"""

from typing import Any
from uuid import uuid4

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance.test_utils import (
    generate_checkpoint,
    generate_config,
    generate_metadata,
)

Saver = BaseCheckpointSaver[Any]


async def _put(saver: Saver, parent: Any, values: dict[str, Any], versions: dict[str, Any]) -> Any:
    """Put a child of `parent`; `versions` are the new ones, a channel without a value is empty."""
    checkpoint = generate_checkpoint(channel_values=values)
    known = parent.get("versions", {}) | versions
    checkpoint["channel_versions"] = known
    new = dict(versions)
    stored = await saver.aput(parent["config"], checkpoint, generate_metadata(), new)
    return {"config": stored, "versions": known}


def _root() -> dict[str, Any]:
    return {"config": generate_config(str(uuid4()))}


async def test_delta_history_collects_writes_back_to_the_seed(saver: Saver) -> None:
    first = await _put(saver, _root(), {"log": ["seed"]}, {"log": "1"})
    await saver.aput_writes(first["config"], [("log", "a")], "t1")
    second = await _put(saver, first, {}, {"log": "2"})
    await saver.aput_writes(second["config"], [("log", "b"), ("other", "x")], "t2")
    third = await _put(saver, second, {}, {"log": "3"})
    await saver.aput_writes(third["config"], [("log", "pending")], "t3")
    found = await saver.aget_delta_channel_history(config=third["config"], channels=["log"])
    assert found["log"]["seed"] == ["seed"]
    assert [w[2] for w in found["log"]["writes"]] == ["a", "b"]


async def test_delta_history_without_a_seed_starts_empty(saver: Saver) -> None:
    first = await _put(saver, _root(), {}, {"log": "1"})
    await saver.aput_writes(first["config"], [("log", 1)], "t")
    second = await _put(saver, first, {}, {"log": "2"})
    channels = ["log", "never"]
    found = await saver.aget_delta_channel_history(config=second["config"], channels=channels)
    assert "seed" not in found["log"]
    assert [w[2] for w in found["log"]["writes"]] == [1]
    assert found["never"] == {"writes": []}


async def test_delta_history_orders_a_steps_writes_by_path(saver: Saver) -> None:
    first = await _put(saver, _root(), {}, {"log": "1"})
    for task, path, value in (("z", "~1", "one"), ("a", "~2", "two"), ("m", "", "input")):
        await saver.aput_writes(first["config"], [("log", value)], task, path)
    second = await _put(saver, first, {}, {"log": "2"})
    found = await saver.aget_delta_channel_history(config=second["config"], channels=["log"])
    assert [w[2] for w in found["log"]["writes"]] == ["input", "one", "two"]


async def test_delta_history_follows_the_fork_it_is_asked_about(saver: Saver) -> None:
    first = await _put(saver, _root(), {"log": []}, {"log": "1"})
    await saver.aput_writes(first["config"], [("log", "shared")], "t")
    left = await _put(saver, first, {}, {"log": "2a"})
    await saver.aput_writes(left["config"], [("log", "left")], "t")
    right = await _put(saver, first, {}, {"log": "2b"})
    await saver.aput_writes(right["config"], [("log", "right")], "t")
    left_child = await _put(saver, left, {}, {"log": "3a"})
    found = await saver.aget_delta_channel_history(config=left_child["config"], channels=["log"])
    assert [w[2] for w in found["log"]["writes"]] == ["shared", "left"]


async def test_delta_history_of_nothing(saver: Saver) -> None:
    assert await saver.aget_delta_channel_history(config=generate_config(), channels=[]) == {}
    found = await saver.aget_delta_channel_history(config=generate_config(), channels=["a"])
    assert found == {"a": {"writes": []}}


async def test_list_is_newest_first_across_namespaces(saver: Saver) -> None:
    thread_id, ids = str(uuid4()), []
    for namespace in ("", "b", "a", "", "b"):
        config = generate_config(thread_id, checkpoint_ns=namespace)
        checkpoint = generate_checkpoint()
        await saver.aput(config, checkpoint, generate_metadata(), {})
        ids.append(checkpoint["id"])
    config: Any = {"configurable": {"thread_id": thread_id}}
    listed = [t.checkpoint["id"] async for t in saver.alist(config, limit=3)]
    assert listed == sorted(ids, reverse=True)[:3]
    before: Any = {"configurable": {"thread_id": thread_id, "checkpoint_id": ids[2]}}
    listed = [t.checkpoint["id"] async for t in saver.alist(config, before=before)]
    assert listed == sorted(ids[:2], reverse=True)


async def test_metadata_comes_back_as_it_was(saver: Saver) -> None:
    given = generate_metadata(step=3, writes={"a": 1}, deep={"x": [1, None, True, 0.5]}, empty={})
    stored = await saver.aput(generate_config(), generate_checkpoint(), given, {})
    found = await saver.aget_tuple(stored)
    assert found is not None
    assert dict(found.metadata) == dict(given)


async def test_values_that_json_cannot_hold(saver: Saver) -> None:
    values = {"nul": "a\0b", "inf": float("inf"), "bytes": b"\0\xff", "none": None, "big": 2**63}
    child = await _put(saver, _root(), values, dict.fromkeys(values, "1"))
    found = await saver.aget_tuple(child["config"])
    assert found is not None
    assert found.checkpoint["channel_values"] == values


async def test_first_write_of_an_index_stays_and_last_special_one(saver: Saver) -> None:
    first = await _put(saver, _root(), {}, {})
    await saver.aput_writes(first["config"], [("a", 1), ("__interrupt__", "old")], "t")
    await saver.aput_writes(first["config"], [("a", 2), ("__interrupt__", "new")], "t")
    found = await saver.aget_tuple(first["config"])
    assert found is not None
    assert sorted(w[1:] for w in found.pending_writes or []) == [("__interrupt__", "new"), ("a", 1)]


async def test_writes_may_come_before_their_checkpoint(saver: Saver) -> None:
    first = await _put(saver, _root(), {}, {})
    checkpoint = generate_checkpoint()
    ahead: Any = {
        "configurable": {**first["config"]["configurable"], "checkpoint_id": checkpoint["id"]}
    }
    await saver.aput_writes(ahead, [("a", "early")], "t")
    stored = await saver.aput(first["config"], checkpoint, generate_metadata(), {})
    latest = await saver.aget_tuple(generate_config(stored["configurable"]["thread_id"]))
    assert latest is not None
    assert [w[2] for w in latest.pending_writes or []] == ["early"]


async def test_a_copy_onto_a_thread_that_has_checkpoints_is_refused(saver: Saver) -> None:
    one = await _put(saver, _root(), {"a": 1}, {"a": "1"})
    two = await _put(saver, _root(), {"a": 2}, {"a": "1"})
    ids = [c["config"]["configurable"]["thread_id"] for c in (one, two)]
    refused = False
    try:
        await saver.acopy_thread(*ids)
    except Exception:
        refused = True
    assert refused
    kept = await saver.aget_tuple(two["config"])
    assert kept is not None
    assert kept.checkpoint["channel_values"] == {"a": 2}


async def test_prune_keeps_what_a_delta_channel_is_rebuilt_from(saver: Saver) -> None:
    first = await _put(saver, _root(), {"log": ["seed"]}, {"log": "1"})
    step = await _put(saver, first, {"log": ["seed", "x"]}, {"log": "2"})
    await saver.aput_writes(step["config"], [("log", "y")], "t")
    checkpoint = generate_checkpoint(channel_versions={"log": "3"})
    metadata = generate_metadata(counters_since_delta_snapshot={"log": [1, 1]})
    head = await saver.aput(step["config"], checkpoint, metadata, {"log": "3"})
    before = await saver.aget_delta_channel_history(config=head, channels=["log"])
    thread_id = head["configurable"]["thread_id"]
    await saver.aprune([thread_id], strategy="keep_latest")
    after = await saver.aget_delta_channel_history(config=head, channels=["log"])
    assert after == before
    listed = [t.checkpoint["id"] async for t in saver.alist(generate_config(thread_id))]
    assert first["config"]["configurable"]["checkpoint_id"] not in listed


async def test_a_deleted_thread_stays_deleted(saver: Saver) -> None:
    first = await _put(saver, _root(), {"a": 1}, {"a": "1"})
    config = first["config"]
    await saver.adelete_thread(config["configurable"]["thread_id"])
    for late in (_late_put(saver, first), saver.aput_writes(config, [("a", 1)], "t")):
        try:
            await late
        except Exception:
            continue
    assert await saver.aget_tuple(generate_config(config["configurable"]["thread_id"])) is None
    assert [
        t async for t in saver.alist(generate_config(config["configurable"]["thread_id"]))
    ] == []


async def _late_put(saver: Saver, parent: dict[str, Any]) -> None:
    await _put(saver, parent, {"a": 2}, {"a": "2"})


SPECS = {
    "delta_history": [
        test_delta_history_collects_writes_back_to_the_seed,
        test_delta_history_without_a_seed_starts_empty,
        test_delta_history_orders_a_steps_writes_by_path,
        test_delta_history_follows_the_fork_it_is_asked_about,
        test_delta_history_of_nothing,
    ],
    "fidelity": [
        test_list_is_newest_first_across_namespaces,
        test_metadata_comes_back_as_it_was,
        test_values_that_json_cannot_hold,
        test_first_write_of_an_index_stays_and_last_special_one,
        test_writes_may_come_before_their_checkpoint,
    ],
    "retention": [
        test_a_copy_onto_a_thread_that_has_checkpoints_is_refused,
        test_prune_keeps_what_a_delta_channel_is_rebuilt_from,
        test_a_deleted_thread_stays_deleted,
    ],
}
