"""
The two-tier protocol as an explicit-state model: every order of a few steps and faults.

Two processes write and read the newest checkpoint of one thread, which has a
second namespace. What one call to a server does is one step here; anything
may happen between two of them. Left out are values, deltas and deletion:
they have deterministic tests of their own.

Each rule of the protocol can be dropped, and then a violation must be found:
a model that finds nothing proves nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

RULES = {
    "own copy": "a writer keeps a copy of what Postgres has not confirmed",
    "evidence": "a copy is dropped after the commit, not before",
    "dirty": "a head is filled from Postgres only while nothing waits in the journal",
    "ticket": "whatever changes the thread voids a fill under way",
    "fill epoch": "a fill counts under the epoch in which it began",
    "head epoch": "a head counts only under the epoch in which it was written",
    "obeyed": "nobody goes past Redis before everyone's reading of the row has ended",
    "holds": "past Redis is only gone in the very epoch that the row has",
    "after": "an answer of Redis is believed if the reading of the row still holds when it came",
    "run": "a Redis process in another's place is not believed",
    "own": "no process believes a head that is older than a copy of its own",
    "void": "a flush of copies that Redis does not have voids its heads",
}


class Redis(NamedTuple):
    """
    The hot tier. A head is (checkpoint, epoch), a ticket the number of a fill.

    Sets of checkpoints are numbers, bit by bit. The thread is hot to begin with.
    """

    run: int = 0
    epoch: int = 0
    head: tuple[int, int] | None = (0, 0)
    journal: int = 0
    ticket: int = 0


class Postgres(NamedTuple):
    """The durable tier, and the row on which all agree."""

    rows: int = 0
    epoch: int = 0
    is_degraded: bool = False
    run: int = 0


class Process(NamedTuple):
    """One process. `op` is what it is in the middle of."""

    copies: int = 0
    newest: int = 0
    """The greatest checkpoint that it was itself acknowledged."""
    epoch: int = 0
    is_degraded: bool = False
    run: int = 0
    is_vouched: bool = True
    """Whether it read the row just now."""
    reaches: bool = True
    op: tuple[Any, ...] = ()


class State(NamedTuple):
    """Everything, at one instant."""

    redis: Redis = Redis()
    postgres: Postgres = Postgres()
    processes: tuple[Process, ...] = (Process(), Process())
    replica: Redis | None = None
    acked: int = 0
    """Checkpoints 1 to this were acknowledged."""
    tickets: int = 0
    is_lossy: bool = False
    """Whether Redis lost something: what others wrote may then be missed for a while."""
    faults: int = 0
    broken: str = ""


Step = tuple[str, State]


class Model:
    """
    All steps that may come next.

    Args:
        dropped: A rule that is not kept.
        puts: Most checkpoints.
        faults: Most faults, of which one may take something away.
    """

    def __init__(self, dropped: str = "", puts: int = 2, faults: int = 2) -> None:
        self._dropped = dropped
        self._puts = puts
        self._faults = faults

    def _keeps(self, rule: str) -> bool:
        assert rule in RULES
        return rule != self._dropped

    def steps(self, state: State) -> Iterator[Step]:
        for number in range(len(state.processes)):
            for name, after in self._of_process(state, number):
                yield f"{number}: {name}", after
        if state.faults < self._faults:
            yield from self._of_nature(state._replace(faults=state.faults + 1))
        if state.redis.head:
            yield "evict", state._replace(redis=state.redis._replace(head=None))
        if state.replica is None and not state.is_lossy:
            yield "replicate", state._replace(replica=state.redis)

    def is_lost(self, state: State) -> bool:
        """Whether something acknowledged is nowhere."""
        kept = state.postgres.rows | state.redis.journal
        for process in state.processes:
            kept |= process.copies
        return kept < _bit(state.acked + 1) - _bit(1)

    # --- what breaks ----------------------------------------------------------

    def _of_nature(self, state: State) -> Iterator[Step]:
        if not state.is_lossy:
            empty = Redis(run=state.redis.run + 1, head=None)
            yield "wipe", state._replace(redis=empty, is_lossy=True, replica=None)
            if state.replica is not None:
                older = state.replica._replace(run=state.redis.run + 1)
                yield "fail over", state._replace(redis=older, is_lossy=True, replica=None)
        for number, process in enumerate(state.processes):
            cut = process._replace(reaches=not process.reaches)
            yield f"{number}: cut or heal", _with(state, number, cut)

    # --- a process ------------------------------------------------------------

    def _of_process(self, state: State, number: int) -> Iterator[Step]:
        process = state.processes[number]
        if process.is_vouched:
            unvouched = process._replace(is_vouched=False)
            yield "its reading ends", _with(state, number, unvouched)
        yield from self._refresh(state, number)
        if process.op:
            yield from getattr(self, f"_{process.op[0]}")(state, number, *process.op[1:])
            return
        if state.acked < self._puts:
            yield from self._put(state, number)
        yield from self._flush(state, number)
        yield from self._get(state, number)
        yield from self._fill(state, number)

    def _refresh(self, state: State, number: int) -> Iterator[Step]:
        process, postgres, redis = state.processes[number], state.postgres, state.redis
        if not process.reaches:
            if not process.is_degraded:
                yield "degrade", self._raise(state, number, postgres.run, is_degraded=True)
            elif not process.is_vouched or process.epoch != postgres.epoch:
                yield "read the row", _with(state, number, _taught(process, postgres))
        elif redis.run != postgres.run:
            yield "notice", self._raise(state, number, redis.run, is_degraded=True)
        else:
            if not process.is_vouched or process.epoch != postgres.epoch:
                yield "read the row", _with(state, number, _taught(process, postgres))
            if postgres.is_degraded and process.epoch == postgres.epoch:
                yield "trust", self._raise(state, number, redis.run, is_degraded=False)

    def _raise(self, state: State, number: int, run: int, *, is_degraded: bool) -> State:
        postgres = state.postgres._replace(
            epoch=state.postgres.epoch + 1, is_degraded=is_degraded, run=run
        )
        taught = _taught(state.processes[number], postgres)
        return _with(state, number, taught)._replace(postgres=postgres)

    def _is_past(self, state: State, process: Process) -> bool:
        """Whether Redis may be passed by now."""
        is_obeyed = not self._keeps("obeyed") or not any(
            other.is_vouched and other.epoch < process.epoch for other in state.processes
        )
        is_held = not self._keeps("holds") or process.epoch == state.postgres.epoch
        return process.is_degraded and is_obeyed and is_held

    def _put(self, state: State, number: int) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        new = state.acked + 1
        acked = state._replace(acked=new)
        if self._is_past(state, process):
            rows = state.postgres.rows | process.copies | _bit(new)
            done = process._replace(copies=0, newest=new)
            after = acked._replace(postgres=state.postgres._replace(rows=rows))
            yield f"put {new} past", _with(after, number, done)
        if process.is_degraded or not process.reaches:
            return
        copies = process.copies | (_bit(new) if self._keeps("own copy") else 0)
        taken = _with(acked, number, process._replace(copies=copies, newest=new))
        ticket = 0 if self._keeps("ticket") else redis.ticket
        head = (new, process.epoch) if self._counts(redis, process) else None
        changed = redis._replace(journal=redis.journal | _bit(new), head=head, ticket=ticket)
        yield f"put {new}", taken._replace(redis=changed)

    def _counts(self, redis: Redis, process: Process) -> bool:
        """Whether the head is one of this epoch."""
        is_of_epoch = not self._keeps("head epoch") or redis.head == (
            redis.head and redis.head[0],
            process.epoch,
        )
        return redis.head is not None and redis.epoch == process.epoch and is_of_epoch

    def _flush(self, state: State, number: int) -> Iterator[Step]:
        process = state.processes[number]
        if process.is_degraded:
            if not process.copies or not self._is_past(state, process):
                return
            journal = 0
        elif process.reaches and (state.redis.journal or process.copies):
            journal = state.redis.journal
        else:
            return
        op = ("trim", journal, process.copies & ~journal, process.copies)
        begun = process._replace(op=op)
        if not self._keeps("evidence"):
            begun = begun._replace(copies=0)
            yield "drop copies", _with(state, number, begun._replace(op=()))
        rows = state.postgres.rows | journal | process.copies
        after = state._replace(postgres=state.postgres._replace(rows=rows))
        yield "flush: commit", _with(after, number, begun)

    def _trim(
        self,
        state: State,
        number: int,
        journal: int,
        only: int,
        copies: int,
    ) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        done = process._replace(op=(), copies=process.copies & ~copies)
        if process.is_degraded:
            yield "flush: end", _with(state, number, done)
        elif process.reaches:
            redis = redis._replace(journal=redis.journal & ~journal)
            if only and self._keeps("void"):
                redis = redis._replace(head=None, ticket=0)
            yield "flush: trim", _with(state, number, done)._replace(redis=redis)
        elif only and self._keeps("void"):
            after = _with(state, number, done)
            yield (
                "flush: degrade",
                self._raise(after, number, state.postgres.run, is_degraded=True),
            )
        else:
            yield "flush: end", _with(state, number, done)

    # --- reading --------------------------------------------------------------

    def _get(self, state: State, number: int) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        if process.is_degraded:
            if process.is_vouched and self._is_past(state, process):
                seen = _newest(state.postgres.rows | process.copies)
                yield "read past", _serve(state, number, seen, process.newest)
        elif process.reaches and process.is_vouched and self._counts(redis, process):
            op = ("asking", process.epoch, process.run)
            yield "ask", _with(state, number, process._replace(op=op))

    def _asking(self, state: State, number: int, epoch: int, run: int) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        is_trusted = not self._keeps("run") or redis.run == run
        asked = process._replace(epoch=epoch)
        own = _newest(process.copies) if self._keeps("own") else 0
        op: tuple[Any, ...] = ()
        if process.reaches and is_trusted and self._counts(redis, asked):
            assert redis.head is not None
            floor = process.newest if state.is_lossy else state.acked
            # A head that is older than a copy of its own has it flush first.
            op = ("answered", redis.head[0], epoch, floor) if redis.head[0] >= own else ()
        yield "answer", _with(state, number, process._replace(op=op))

    def _answered(
        self, state: State, number: int, seen: int, epoch: int, floor: int
    ) -> Iterator[Step]:
        process = state.processes[number]
        done = _with(state, number, process._replace(op=()))
        is_current = process.epoch == epoch and process.is_vouched and not process.is_degraded
        if is_current or not self._keeps("after"):
            yield f"serve {seen}", _serve(done, number, seen, floor)
        else:
            yield "ask again", done

    def _fill(self, state: State, number: int) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        is_clean = not redis.journal or not self._keeps("dirty")
        if process.is_degraded or not process.reaches or process.copies or not is_clean:
            return
        tickets = state.tickets + (not redis.ticket)
        ticket = redis.ticket or tickets
        drawn = state._replace(redis=redis._replace(ticket=ticket), tickets=tickets)
        for namespace in (0, 1):
            op = ("filling", namespace, ticket, process.epoch, -1)
            yield f"fill {namespace}: ticket", _with(drawn, number, process._replace(op=op))

    def _filling(
        self, state: State, number: int, namespace: int, ticket: int, epoch: int, seen: int
    ) -> Iterator[Step]:
        process, redis = state.processes[number], state.redis
        if seen < 0:
            seen = _newest(state.postgres.rows)
            op = ("filling", namespace, ticket, epoch, seen)
            yield f"fill {namespace}: read {seen}", _with(state, number, process._replace(op=op))
            return
        done = _with(state, number, process._replace(op=()))
        is_refused = redis.ticket != ticket or (redis.journal and self._keeps("dirty"))
        if is_refused or not process.reaches:
            yield f"fill {namespace}: refused", done
            return
        under = epoch if self._keeps("fill epoch") else process.epoch
        filled = redis._replace(epoch=under)
        if namespace == 0:
            filled = filled._replace(head=(seen, under))
        yield f"fill {namespace}: set {seen}", done._replace(redis=filled)


def _bit(checkpoint: int) -> int:
    return 1 << checkpoint


def _newest(checkpoints: int) -> int:
    return max(checkpoints.bit_length() - 1, 0)


def _with(state: State, number: int, process: Process) -> State:
    processes = list(state.processes)
    processes[number] = process
    return state._replace(processes=tuple(processes))


def _taught(process: Process, postgres: Postgres) -> Process:
    return process._replace(
        epoch=postgres.epoch,
        is_degraded=postgres.is_degraded,
        run=postgres.run,
        is_vouched=True,
    )


def _serve(state: State, number: int, seen: int, floor: int) -> State:
    if seen >= floor:
        return state
    return state._replace(broken=f"process {number} read {seen} after {floor}")


def _ranks(values: Iterable[int]) -> dict[int, int]:
    return {value: rank for rank, value in enumerate(sorted(set(values)))}


# Where an operation under way keeps the epoch in which it began.
_EPOCH_AT = {"asking": 1, "answered": 2, "filling": 3}


def canonical(state: State) -> State:
    """
    Return the state that stands for all that differ in names only.

    Of epochs only the order matters, of tickets and Redis's runs only which
    are the same, and which process is the first does not.
    """
    redis, postgres, replica, two = state.redis, state.postgres, state.replica, state.processes
    heads = [r.head[1] for r in (redis, replica) if r and r.head]
    fills = [p.op for p in two if p.op and p.op[0] == "filling"]
    asked = [p.op[_EPOCH_AT[p.op[0]]] for p in two if p.op and p.op[0] in _EPOCH_AT]
    epochs = _ranks(
        [redis.epoch, postgres.epoch, *heads, *asked, *(p.epoch for p in two)]
        + ([replica.epoch] if replica else [])
    )
    tickets = _ranks([0, redis.ticket, *(op[2] for op in fills), replica.ticket if replica else 0])
    asking = [p.op[2] for p in two if p.op and p.op[0] == "asking"]
    runs = _ranks([redis.run, postgres.run, *asking, *(p.run for p in two)])

    def named(tier: Redis) -> Redis:
        head = tier.head and (tier.head[0], epochs[tier.head[1]])
        return tier._replace(epoch=epochs[tier.epoch], head=head, ticket=tickets[tier.ticket])

    def renamed(process: Process) -> Process:
        op = process.op
        if op and op[0] == "filling":
            op = (*op[:2], tickets[op[2]], epochs[op[3]], op[4])
        elif op and op[0] == "answered":
            op = (*op[:2], epochs[op[2]], op[3])
        elif op and op[0] == "asking":
            op = (op[0], epochs[op[1]], runs[op[2]])
        return process._replace(epoch=epochs[process.epoch], run=runs[process.run], op=op)

    return state._replace(
        redis=named(redis)._replace(run=runs[redis.run]),
        postgres=postgres._replace(epoch=epochs[postgres.epoch], run=runs[postgres.run]),
        processes=tuple(sorted(map(renamed, two))),
        replica=replica and named(replica)._replace(run=0),
        tickets=max(tickets.values()),
    )


def explore(model: Model, most: int = 10**7) -> tuple[int, list[str]]:
    """
    Walk through every state that can be reached, breadth first.

    Returns:
        How many there are; and the steps to the first violation, if there is one.
    """
    start = canonical(State())
    came: dict[State, tuple[State, str] | None] = {start: None}
    now = [start]
    while now and len(came) < most:
        later = []
        for state in now:
            for name, reached in model.steps(state):
                after = canonical(reached)
                if after in came:
                    continue
                came[after] = state, name
                if after.broken or model.is_lost(after):
                    return len(came), [*_trace(came, after), after.broken or "lost"]
                later.append(after)
        now = later
    return len(came), []


def _trace(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names = []
    while (step := came[state]) is not None:
        state, name = step
        names.append(name)
    return names[::-1]
