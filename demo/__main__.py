"""
The show: `python -m demo` from the repository's root. Its output explains itself.

Every claim in the closing list was measured a moment before; if one does not
hold, the exit status is not zero.
"""

import asyncio
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from textwrap import fill
from typing import Any
from uuid import uuid4

from langchain_core.messages import HumanMessage
from langgraph.types import Command

from demo import home, inside
from demo.agent import WISH_QUESTION, Desk, build, choose, memories, on_thread
from demo.embedder import local_embedder
from demo.reviewer import ScriptedReviewer
from demo.worker import Job, hire
from langgraph_vat import Vat

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".vat-demo"
CODE = "langgraph_vat"
FILES = 10
STALL_AT = 8
USER = "ada"
FIRST, SECOND = "review-monday", "review-friday"
PASSWORD = f"pw-{uuid4().hex[:12]}"
REQUEST = f"Please review {CODE}. The staging password is {PASSWORD}, should you need it."
WISH = "Spare me the essays: one line per remark is plenty."
ANSWER = f"Yes, publish it. From now on: {WISH}"
OLDER_MEMORIES = (
    "Deploys happen on Thursdays, never on a Friday.",
    "The staging cluster is in Lisbon.",
    "My dog is called Biscuit and hates the vacuum cleaner.",
)
READS = 20
LEAST_JOURNAL_BYTES = 1_000  # less would mean that we looked in the wrong place


@dataclass
class Show:
    """One open `Vat`, and what was proved on it so far."""

    vat: Vat
    proofs: list[tuple[bool, str]] = field(default_factory=list)
    titles: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self.graph = build(ScriptedReviewer()).compile(
            checkpointer=self.vat.checkpointer, store=self.vat.store
        )
        self.desk = Desk(USER, ROOT)

    def title(self, text: str) -> None:
        """Open the next step of the show."""
        print(f"\n{next(self.titles)}. {text}")

    def prove(self, holds: bool, fact: str) -> None:  # noqa: FBT001 - one form, many calls
        """Keep what was measured, and whether the claim holds."""
        self.proofs.append((holds, fact))

    def job(self, **more: Any) -> Job:
        """Return a worker's job on the first thread."""
        servers = {"postgres": self.vat.postgres, "redis": self.vat.redis}
        return Job(home=str(HOME), root=str(ROOT), user=USER, thread=FIRST, **servers, **more)


def main() -> int:
    """Run the show and return the exit status."""
    began = time.monotonic()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    print("langgraph-vat: an agent that is killed, comes back, remembers and keeps secrets")
    with home.start(HOME) as vat:
        show = Show(vat)
        introduce(show, began)
        killed = work_until_killed(show)
        look_at_the_wreck(show, killed)
        resume(show, killed)
        answer(show)
        another_conversation(show)
        timeline(show)
        served_hot(show)
        look_inside(show)
    return conclude(show, time.monotonic() - began)


def introduce(show: Show, began: float) -> None:
    show.title("A real Postgres with pgvector and a real Redis, both ours alone")
    for number, text in enumerate(OLDER_MEMORIES):
        show.vat.store.put(memories(USER), f"older-{number}", {"text": text})
    print(
        f"   started in {time.monotonic() - began:.1f} s below {HOME.name}/, sealed with a new key"
    )
    print(f"   recall by {local_embedder().name}")
    print(f"   {len(OLDER_MEMORIES)} memories of older talks with Ada are in the store")


def work_until_killed(show: Show) -> list[dict[str, Any]]:
    """Let a worker review until its model hangs, kill it, and return the tasks it started."""
    show.title("Ada asks for a review; a worker process reads one file per super-step")
    stall_on = choose(ROOT, CODE, FILES)[STALL_AT - 1]
    request = {"messages": [{"role": "user", "content": REQUEST}], "path": CODE, "limit": FILES}
    worker = hire(show.job(request=request, stall_on=stall_on))
    print(f"   Ada: {REQUEST}")
    tasks = []
    for task in told(worker):
        tasks.append(task)
        print_task(task)
        if task["file"] == stall_on:
            print(f"   ... the model hangs. kill -9 {worker.pid}")
            worker.kill()
    show.prove(worker.wait() == -9, f"the worker died of SIGKILL in step {tasks[-1]['step']}")
    return tasks


def look_at_the_wreck(show: Show, killed: list[dict[str, Any]]) -> None:
    acknowledged = killed[-1]["step"] - 1
    durable = inside.newest_step(show.vat.postgres, FIRST)
    show.title("What the dead process left behind")
    only_hot = [str(step) for step in range(durable + 1, acknowledged + 1)]
    print(f"   newest step acknowledged to it: {acknowledged}")
    print(f"   newest step in Postgres:        {durable}")
    print(f"   in the Redis journal only:      {', '.join(only_hot) or 'none'}")
    fact = f"acknowledged, yet not in Postgres when the worker died: {len(only_hot)} step(s)"
    show.prove(bool(only_hot), fact)
    journal = inside.search_redis(show.vat.redis, [PASSWORD])
    show.prove(
        journal.hits[PASSWORD] == 0 and journal.size > LEAST_JOURNAL_BYTES,
        f"not even then was the password readable in Redis ({journal.size:,} bytes searched)",
    )


def resume(show: Show, killed: list[dict[str, Any]]) -> None:
    show.title("A new process resumes the thread")
    worker = hire(show.job())
    *tasks, reads = told(worker)
    for task in tasks:
        print_task(task)
    show.prove(worker.wait() == 0, f"process {worker.pid} took over and ended by itself")
    finished = {task["file"] for task in killed[:-1] if task["file"]}
    repeated = finished & {task["file"] for task in tasks}
    print(f"   repeated: {len(repeated)} of the {len(finished)} reviews that were finished")
    print(f"   its reads of state: {reads['hits']} from Redis, {reads['misses']} from Postgres")
    show.prove(
        (tasks[0]["step"], tasks[0]["file"]) == (killed[-1]["step"], killed[-1]["file"]),
        f"it went on at step {tasks[0]['step']}, the very one that was cut off",
    )
    show.prove(
        not repeated and len(finished) == STALL_AT - 1,
        f"none of the {len(finished)} finished reviews was done again",
    )


def answer(show: Show) -> None:
    show.title("The agent waits for a human, and the human answers")
    config = on_thread(FIRST)
    (question,) = show.graph.get_state(config).interrupts
    print(f"   agent: {question.value}")
    print(f"   Ada: {ANSWER}")
    result = show.graph.invoke(Command(resume=ANSWER), config, context=show.desk)
    done = not show.graph.get_state(config).next
    show.prove(
        done and len(result["remarks"]) == FILES,
        f"one interrupt, answered in a third process; all {FILES} files are in the review",
    )


def another_conversation(show: Show) -> None:
    show.title("Another conversation, through `await` on the very same objects")
    config = on_thread(FIRST)
    before = max(show.graph.get_state(config).values["remarks"], key=len)
    path = re.search(r"[\w/]+\.py", before)
    assert path is not None
    result = asyncio.run(ask_again(show, path.group()))
    after = result["remarks"][0]
    print(f"   the same file on Monday ({len(before.split())} words):")
    print(f"      {before.splitlines()[-1]}")
    print(f"   and today ({len(after.split())} words):")
    print(f"      {after.splitlines()[-1]}")
    fact = f"the wish changed the next review of {path.group()}: "
    fact += f"{len(before.split())} words became {len(after.split())}"
    if local_embedder().knows_meaning:
        show.prove(result["wish"] == WISH and len(after) < len(before), fact)
    else:
        print("   (recall by meaning is not shown: no sentence model is installed)")


async def ask_again(show: Show, path: str) -> dict[str, Any]:
    """Start a new thread about one file; print what memory holds in order of nearness."""
    print(f"   Ada, days later, in a new thread: Look at {path} again.")
    print(f"   the agent asks its memory: {WISH_QUESTION}")
    found = await show.vat.store.asearch(memories(USER), query=WISH_QUESTION)
    for item in found:
        print(f"      {item.score or 0:5.2f}  {item.value['text']}")
    if local_embedder().knows_meaning:
        shared = words(WISH) & words(WISH_QUESTION)
        show.prove(
            found[0].value["text"] == WISH and not shared,
            "the wish was found by meaning: no word in common with the question",
        )
    request = {"messages": [HumanMessage(f"Look at {path} again.")], "path": path, "limit": 1}
    config = on_thread(SECOND)
    return await show.graph.ainvoke(request, config, context=show.desk)


def timeline(show: Show) -> None:
    show.title("The timeline of the first thread, newest first")
    history = list(show.graph.get_state_history(on_thread(FIRST)))
    for state in history:
        remarks = len(state.values.get("remarks", []))
        then = ", ".join(state.next) or "(end)"
        print(f"   step {state.metadata['step']:>2}  {remarks:>2} done  then {then}")
    steps = [state.metadata["step"] for state in history]
    durable = inside.checkpoints(show.vat.postgres, FIRST)
    show.prove(
        steps == list(range(steps[0], -2, -1)) and durable == len(steps),
        f"{len(steps)} checkpoints without a gap, all {durable} of them in Postgres now",
    )


def served_hot(show: Show) -> None:
    show.title("Where reads were answered")
    before, began = show.vat.checkpointer.stats.hits, time.perf_counter()
    for _ in range(READS):
        show.graph.get_state(on_thread(SECOND))
    each = (time.perf_counter() - began) / READS
    stats = show.vat.checkpointer.stats
    hot = stats.hits - before
    print(
        f"   {hot} of {READS} reads of a thread's state came from Redis, {each * 1e3:.2f} ms each"
    )
    print(f"   this process in all: {stats.hits} hot, {stats.misses} from Postgres")
    show.prove(hot > READS // 2, f"{hot} of {READS} reads were served hot")


def look_inside(show: Show) -> None:
    show.title("What the servers really hold of what Ada typed")
    postgres, redis = show.vat.postgres, show.vat.redis
    secrets, control = [PASSWORD, WISH], FIRST
    needles = [*secrets, control]
    searches = [
        inside.search_postgres(postgres, needles),
        inside.search_redis(redis, needles),
        inside.search_disk(HOME, postgres, redis, needles),
    ]
    for found in searches:
        print(f"   {found.pieces:>5} {found.place:<14} {found.size:>12,} bytes: {hits_of(found)}")
    channel, tag, blob = inside.largest_blob(postgres, FIRST)
    print(f"   channel {channel!r} in Postgres, {tag}, {len(blob)} bytes:")
    print(f"      {blob[:32].hex(' ')}")
    print(f"      {blob[32:64].hex(' ')} ...")
    hits = sum(found.hits[secret] for found in searches for secret in secrets)
    show.prove(
        hits == 0 and searches[0].hits[control] > 0 and searches[2].hits[control] > 0,
        f"{hits} traces of password or wish in all tables, all keys and all files; "
        "the search works: it finds the thread's name",
    )


def conclude(show: Show, seconds: float) -> int:
    print("\nWhat this proved")
    for holds, fact in show.proofs:
        mark = "   [ok] " if holds else "   [NOT SO] "
        print(fill(fact, 96, initial_indent=mark, subsequent_indent=" " * 8))
    failed = sum(not holds for holds, _ in show.proofs)
    print(f"\n{len(show.proofs) - failed} of {len(show.proofs)} hold; {seconds:.0f} seconds.")
    return 1 if failed else 0


def told(worker: Any) -> Iterator[dict[str, Any]]:
    """Yield what a worker tells, until it ends."""
    for line in worker.stdout:
        yield json.loads(line)


def print_task(task: dict[str, Any]) -> None:
    print(f"   step {task['step']:>2}  {task['node']:<8} {task['file']}")


def hits_of(found: inside.Searched) -> str:
    secrets = found.hits[PASSWORD], found.hits[WISH], found.hits[FIRST]
    return "password {}, wish {}, thread id {} times".format(*secrets)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


if __name__ == "__main__":
    sys.exit(main())
