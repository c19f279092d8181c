"""Threads in a file, and out of it again."""

import json
import operator
import os
import random
import signal
import subprocess
import sys
import time
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt

from langgraph_vat import (
    ConfigurationError,
    HybridSaver,
    InvalidInputError,
    Keyring,
    SealError,
    UnavailableError,
)
from langgraph_vat.archive import Archive
from langgraph_vat.migrate import acopy_checkpoints, copy_checkpoints

KEYRING = Keyring.generate()
WORDS = [f"word{number}" for number in range(3000)]


class State(TypedDict):
    log: Annotated[list[str], operator.add]


def talk(saver: Any, thread_id: str, turns: int) -> None:
    dice = random.Random(thread_id)

    def say(_: State) -> Any:
        return {"log": [" ".join(dice.choices(WORDS, k=100)) + " s3cret"]}

    def ask(_: State) -> Any:
        return {"log": [interrupt("more?")]}

    inner = StateGraph(State).add_node(ask).add_edge(START, "ask").compile()
    builder = StateGraph(State).add_node(say).add_node("inner", inner)
    builder.add_conditional_edges(START, lambda s: [Send("say", s)] * 2)
    graph = builder.add_edge("say", "inner").compile(checkpointer=saver)
    for turn in range(turns):
        graph.invoke({"log": [f"in {turn}"]}, at(thread_id))
        graph.invoke(Command(resume=f"answer {turn}"), at(thread_id))


def at(thread_id: str, ns: str | None = None) -> Any:
    found = {"thread_id": thread_id}
    return {"configurable": found if ns is None else {**found, "checkpoint_ns": ns}}


def shown(saver: Any) -> dict[Any, Any]:
    return {
        tuple(found.config["configurable"].values()): found._replace(
            pending_writes=sorted(found.pending_writes, key=repr)
        )
        for found in saver.list(None)
    }


@pytest.fixture(params=[None, KEYRING], ids=["clear", "sealed"])
def keyring(request):
    return request.param


async def test_out_of_a_saver_and_into_another(postgres_url, redis_url, tmp_path, keyring):
    path = tmp_path / "threads.jsonl"
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, keyring=KEYRING) as saver:
        for thread_id in ("a", "b"):
            talk(saver, thread_id, 4)
        with Archive(path, keyring=keyring) as archive:
            done = copy_checkpoints(saver, archive)
            assert done.copied == done.total > 30
            assert shown(archive) == shown(saver)
            assert (await acopy_checkpoints(saver, archive)).copied == 0
        assert (b"s3cret" in path.read_bytes()) is False  # it is base64, or sealed
        assert path.stat().st_mode & 0o777 == 0o600
        with (
            Archive(path, keyring=keyring, read_only=True) as archive,
            HybridSaver.from_conn_string(postgres_url, schema="other") as target,
        ):
            await acopy_checkpoints(archive, target)
            assert shown(target) == shown(saver) == shown(archive)
            talk(target, "a", 1)


def test_all_savers_of_langgraph_go_through_it(tmp_path, keyring):
    memory, again = InMemorySaver(), InMemorySaver()
    talk(memory, "t", 3)
    with Archive(tmp_path / "a", keyring=keyring) as archive:
        copy_checkpoints(memory, archive)
        copy_checkpoints(archive, again)
        assert shown(again) == shown(archive) == shown(memory)
        ids = sorted((found.checkpoint["id"] for found in memory.list(None)), reverse=True)
        assert [found.checkpoint["id"] for found in archive.list(at("t"), limit=3)] == ids[:3]
        newest = archive.get_tuple(at("t", ""))
        assert newest.config == memory.get_tuple(at("t", "")).config
        assert archive.get_tuple(at("nobody", "")) is None
        for found in (*archive.list(at("t"), filter={"step": 1}),):
            assert found.metadata["step"] == 1
        assert [f.config for f in archive.list(at("t", ""), before=newest.config, limit=1)] == [
            newest.parent_config
        ]


def test_it_grows_with_what_was_said_and_not_with_its_length_squared(tmp_path, keyring):
    with Archive(tmp_path / "a", keyring=keyring) as archive:
        sizes, log, config = [], [], at("t", "")
        dice, version = random.Random(1), None
        for step in range(240):
            log = [*log, " ".join(dice.choices(WORDS, k=100))]
            checkpoint, version = (
                empty_checkpoint(),
                InMemorySaver().get_next_version(version, None),
            )
            checkpoint["channel_values"] = {"log": log}
            checkpoint["channel_versions"] = {"log": version}
            config = archive.put(config, checkpoint, {"step": step}, {"log": version})
            sizes.append((tmp_path / "a").stat().st_size)
        assert sizes[239] - sizes[119] < 1.5 * sizes[119]
        assert archive.get_tuple(config).checkpoint["channel_values"] == {"log": log}


def test_a_version_that_is_used_again_takes_nothing_with_it(tmp_path, keyring):
    with Archive(tmp_path / "a", keyring=keyring) as archive:
        made, text = [], "x" * 3000
        for step, version in enumerate("12324"):
            text += str(step)
            checkpoint = empty_checkpoint()
            checkpoint["channel_values"] = {"a": text}
            checkpoint["channel_versions"] = {"a": version}
            made.append((archive.put(at("t", ""), checkpoint, {}, {"a": version}), text))
        values = [archive.get_tuple(one).checkpoint["channel_values"]["a"] for one, _ in made]
        assert values == [made[0][1], made[3][1], made[2][1], made[3][1], made[4][1]]


def test_a_line_that_was_not_finished_is_as_if_it_never_was(tmp_path, keyring):
    path, memory = tmp_path / "a", InMemorySaver()
    talk(memory, "t", 2)
    with Archive(path, keyring=keyring) as archive:
        copy_checkpoints(memory, archive)
    whole = path.read_bytes()
    ends = [position for position, byte in enumerate(whole) if byte == 10]
    for end in (0, 5, ends[0], ends[0] + 1, ends[3] + 7, ends[-2] + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        if end > ends[0]:
            with Archive(path, keyring=keyring, read_only=True) as archive:
                list(archive.list(None))
        else:
            with pytest.raises(ConfigurationError, match="no archive"):
                Archive(path, keyring=keyring, read_only=True)
        assert path.read_bytes() == whole[:end]
        with Archive(path, keyring=keyring) as archive:
            copy_checkpoints(memory, archive)
            assert shown(archive) == shown(memory)


def test_a_copy_that_is_killed_goes_on(tmp_path):
    path, memory = tmp_path / "a", InMemorySaver()
    talk(memory, "t", 8)
    program = (
        "import sys; from tests.test_archive import *; memory = InMemorySaver();"
        "talk(memory, 't', 8); print('begins', flush=True);"
        "copy_checkpoints(memory, Archive(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not path.exists() or path.stat().st_size < 5000:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Archive(path) as archive:
        copy_checkpoints(memory, archive)
        found = shown(archive)
        assert found == found | shown(memory)


def test_a_sealed_file_wants_its_keyring_and_shows_changes(tmp_path):
    path, memory = tmp_path / "a", InMemorySaver()
    talk(memory, "t", 2)
    with Archive(path, keyring=KEYRING) as archive:
        copy_checkpoints(memory, archive)
    for wrong in (None, Keyring.generate()):
        with pytest.raises(SealError):
            Archive(path, keyring=wrong)
    with Archive(tmp_path / "clear"):
        pass
    with pytest.raises(SealError):
        Archive(tmp_path / "clear", keyring=KEYRING)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    values = [n for n, line in enumerate(lines) if "value" in line]
    lines[values[0]]["data"], lines[values[1]]["data"] = (
        lines[values[1]]["data"],
        lines[values[0]]["data"],
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Archive(path, keyring=KEYRING) as archive, pytest.raises(SealError):
        list(archive.list(None))


def test_what_is_no_archive_is_left_as_it_is(tmp_path):
    path = tmp_path / "a"
    with Archive(tmp_path / "good"):
        pass
    good = (tmp_path / "good").read_text()
    for text in (
        "hello\n",
        "hello",
        "[1]\n",
        '{"archive": 2, "id": "x", "data_key": null}\n',
        "{}\n",
        '{"archive": 1}\n',
        good + good,
        good + '{"value": [1]}\n',
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="left as it is"):
            Archive(path)
        assert path.read_text() == text
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Archive(tmp_path / "nowhere" / "a")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Archive(tmp_path / "nothing", read_only=True)


def test_one_writes_or_many_read(tmp_path):
    with Archive(tmp_path / "a") as archive:
        with pytest.raises(ConfigurationError, match="another process"):
            Archive(tmp_path / "a", read_only=True)
        with pytest.raises(InvalidInputError, match="thread_id"):
            archive.put({"configurable": {}}, empty_checkpoint(), {}, {})
    with pytest.raises(ConfigurationError, match="closed"):
        archive.put(at("t", ""), empty_checkpoint(), {}, {})
    with Archive(tmp_path / "a", read_only=True), Archive(tmp_path / "a", read_only=True):
        pass


def test_a_full_disk_takes_nothing_that_was_there(tmp_path, monkeypatch):
    path, left = tmp_path / "a", [10_000]
    pwrite = os.pwrite

    def short(file: int, raw: bytes, offset: int) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = pwrite(file, raw[: min(left[0], 100)], offset)
        left[0] -= done
        return done

    with Archive(path) as archive:
        monkeypatch.setattr("langgraph_vat.archive.os.pwrite", short)
        config, made = at("t", ""), []

        def fill() -> None:
            while True:
                made.append(archive.put(made[-1], empty_checkpoint(), {"note": "x" * 500}, {}))

        made.append(archive.put(config, empty_checkpoint(), {}, {}))
        with pytest.raises(UnavailableError, match="No space"):
            fill()
        monkeypatch.undo()
        made.append(archive.put(made[-1], empty_checkpoint(), {}, {}))
    with Archive(path, read_only=True) as archive:
        assert [found.config for found in archive.list(None)] == made[::-1]


def test_a_graph_may_run_on_it_and_fork(tmp_path):
    with Archive(tmp_path / "a") as archive:
        builder = StateGraph(State).add_node("say", lambda s: {"log": [f"{len(s['log'])}"]})
        graph = builder.add_edge(START, "say").compile(checkpointer=archive)
        for turn in range(3):
            graph.invoke({"log": [f"in {turn}"]}, at("t"))
        before = {s.config["configurable"]["checkpoint_id"]: s.values
                  for s in graph.get_state_history(at("t"))}  # fmt: skip
        fork = list(graph.get_state_history(at("t")))[3]
        graph.update_state(fork.config, {"log": ["FORK"]})
        graph.invoke({"log": ["after"]}, at("t"))
        after = {s.config["configurable"]["checkpoint_id"]: s.values
                 for s in graph.get_state_history(at("t"))}  # fmt: skip
        assert {key: after[key] for key in before} == before
