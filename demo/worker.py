"""
A process that works on one thread until it ends, asks a human or is killed.

Reads its job as JSON from standard input and reports each task that it starts
as a line of JSON. LangGraph starts a task only after the checkpoint before it
was acknowledged (`durability="sync"`), so a reported step n proves that n - 1 was kept.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from demo import home
from demo.agent import Desk, build, on_thread
from demo.reviewer import ScriptedReviewer


@dataclass(frozen=True)
class Job:
    """What a worker is told; without a request it resumes the thread where it stands."""

    home: str
    postgres: str
    redis: str
    root: str
    user: str
    thread: str
    request: dict[str, Any] | None = None
    stall_on: str = ""


def hire(job: Job) -> Popen[str]:
    """Start a worker process on a job."""
    command = [sys.executable, "-m", "demo.worker"]
    process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=job.root)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job)))
    process.stdin.close()
    return process


def main() -> None:
    """Do the job on standard input."""
    job = Job(**json.load(sys.stdin))
    with home.join(Path(job.home), job.postgres, job.redis) as vat:
        graph = build(ScriptedReviewer(stall_on=job.stall_on)).compile(
            checkpointer=vat.checkpointer, store=vat.store
        )
        for event in graph.stream(
            job.request,
            on_thread(job.thread),
            context=Desk(job.user, Path(job.root)),
            stream_mode="debug",
            durability="sync",
        ):
            if event["type"] == "task":
                report(event["step"], event["payload"])
        say(hits=vat.checkpointer.stats.hits, misses=vat.checkpointer.stats.misses)


def report(step: int, task: dict[str, Any]) -> None:
    """Say which task starts now, and for a review which file."""
    todo = task["input"].get("todo", []) if task["name"] == "review" else []
    say(step=step, node=task["name"], file=todo[0] if todo else "")


def say(**fact: Any) -> None:
    """Tell the parent process one thing."""
    print(json.dumps(fact), flush=True)


if __name__ == "__main__":
    main()
