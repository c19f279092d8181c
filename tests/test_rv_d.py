import os, time, random, signal, asyncio, multiprocessing, sys, json
import pytest, psycopg, redis
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds)
ctx = multiprocessing.get_context("fork")
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

def one_put(saver, config, number, thread):
    values = {"small": f"{MARKER}{number}", "large": ["x"*20000 + MARKER*(number+1)], "list": [MARKER+str(i) for i in range(number+1)], "none": None}
    versions = {c: saver.get_next_version(None, None) for c in values}
    cp = {**empty_checkpoint(), "id": str(uuid6()), "channel_values": values, "channel_versions": versions}
    return cp, {"source":"loop","step":number,"note":MARKER}, versions

def writer(pg, rd, threads, path, every, is_async, storage):
    fd = os.open(path, os.O_APPEND|os.O_CREAT|os.O_WRONLY)
    try:
        saver = HybridSaver.from_conn_string(pg, redis=rd, flush_every=every, flush_after=0.5, storage=storage, keyring=KEYRING, accept_plaintext=soon(), epoch_ttl_s=0.5)
        def ack(t, n): os.write(fd, f"{t} {n}\n".encode())
        if is_async:
            async def go():
                async def w(t):
                    while True:
                        cur = await saver.aget_tuple(at(t))
                        n = cur.metadata["step"] + 1
                        cp, md, v = one_put(saver, cur.config, n, t)
                        c = await saver.aput(cur.config, cp, md, v)
                        await saver.aput_writes(c, [("small", MARKER), ("list", [MARKER])], "task")
                        ack(t, n)
                await asyncio.gather(*(w(t) for t in threads))
            asyncio.run(go())
        else:
            while True:
                for t in threads:
                    cur = saver.get_tuple(at(t))
                    n = cur.metadata["step"] + 1
                    cp, md, v = one_put(saver, cur.config, n, t)
                    c = saver.put(cur.config, cp, md, v)
                    saver.put_writes(c, [("small", MARKER), ("list", [MARKER])], "task")
                    ack(t, n)
    except BaseException as e:
        os.write(2, f"WRITER {type(e).__name__} {str(e)[:200]}\n".encode())
    os._exit(0)

def sealer(pg, rd, path):
    fd = os.open(path, os.O_APPEND|os.O_CREAT|os.O_WRONLY)
    try:
        vat = Vat.connect(pg, rd, keyring=KEYRING, accept_plaintext=soon(), epoch_ttl_s=0.5)
        while True:
            d = vat.seal_existing(); os.write(fd, f"{d}\n".encode())
            time.sleep(.05)
    except BaseException as e:
        os.write(2, f"SEALER {type(e).__name__} {str(e)[:200]}\n".encode())
    os._exit(0)

def putter(pg, name, path, is_async):
    fd = os.open(path, os.O_APPEND|os.O_CREAT|os.O_WRONLY)
    try:
        s = SemanticStore.from_conn_string(pg, keyring=KEYRING, accept_plaintext=soon(), filterable_fields=("u",))
        n = 0
        async def aput():
            nonlocal n
            while True:
                n += 1
                k = f"{name}-{os.getpid()}-{n}"; r = random.choice("abcdefgh")
                await s.aput((r, "x"), k, {"t": MARKER, "u": k}, ttl=random.choice([None, 100]))
                os.write(fd, f"{r} {k}\n".encode())
        if is_async: asyncio.run(aput())
        while True:
            n += 1
            k = f"{name}-{os.getpid()}-{n}"; r = random.choice("abcdefgh")
            s.put((r, "x"), k, {"t": MARKER, "u": k}, ttl=random.choice([None, 100]))
            os.write(fd, f"{r} {k}\n".encode())
            if n % 5 == 0: s.search((r,), filter={"u": k}, limit=3)
    except BaseException as e:
        os.write(2, f"PUTTER {type(e).__name__} {str(e)[:200]}\n".encode())
    os._exit(0)


@pytest.mark.parametrize("storage", ["compact", "compatible"])
@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("round_", range(int(os.environ.get("ROUNDS", "2"))))
def test_kill9(postgres_url, redis_url, every, storage, round_, tmp_path):
    dice = random.Random(round_*7 + every)
    T = 24
    with Vat.connect(postgres_url, redis_url, flush_every=8) as plain:
        for i in range(T):
            c = at(f"t{i}")
            for n in range(6):
                cp, md, v = one_put(plain.checkpointer, c, n, "")
                c = plain.checkpointer.put(c, cp, md, v)
        for r in "abcdefgh":
            for n in range(60): plain.store.put((r, "x"), f"p{n}", {"t": MARKER, "u": str(n)})
    acks, items, log = tmp_path/"acks", tmp_path/"items", tmp_path/"log"
    for p in (acks, items, log): p.touch()
    def w(k): return ctx.Process(target=writer, args=(postgres_url, redis_url, [f"t{i}" for i in range(T) if i%3==k], str(acks), every, k==1, storage))
    def s(k): return ctx.Process(target=sealer, args=(postgres_url, redis_url, str(log)))
    def p(k): return ctx.Process(target=putter, args=(postgres_url, f"w{k}", str(items), k==1))
    jobs = [(w,0),(w,1),(w,2),(p,0),(p,1)]
    procs = [f(k) for f,k in jobs]
    [x.start() for x in procs]
    time.sleep(1.0)
    jobs += [(s,0),(s,1)]
    for f,k in jobs[5:]:
        x = f(k); x.start(); procs.append(x)
    end = time.time() + float(os.environ.get("SECONDS_", "7"))
    kills = 0
    while time.time() < end:
        time.sleep(dice.uniform(0.05, 0.35))
        i = dice.choice([0,1,2,3,4,5,5,6,6])
        procs[i].kill(); procs[i].join(); kills += 1
        f,k = jobs[i]; procs[i] = f(k); procs[i].start()
    # let the sealers finish while writers run, then kill all
    time.sleep(2)
    for x in procs: x.kill()
    for x in procs: x.join()
    with Vat.connect(postgres_url, redis_url, keyring=KEYRING, accept_plaintext=soon()) as v:
        for _ in range(30):
            d = v.seal_existing()
            if d == (0,0,0): break
        print("last", d, "kills", kills)
        v.checkpointer.flush()
    best = {}
    for line in acks.read_text().splitlines():
        t, n = line.split(); best[t] = max(best.get(t, 0), int(n))
    print("acked", sum(best.values()), "items", len(items.read_text().splitlines()))
    with Vat.connect(postgres_url, redis_url, keyring=KEYRING, flush_every=8) as v:
        for i in range(T):
            found = [x.metadata["step"] for x in v.checkpointer.list(at(f"t{i}"))]
            assert set(range(best.get(f"t{i}", 5)+1)) <= set(found), (i, best.get(f"t{i}"), found)
            for x in v.checkpointer.list(at(f"t{i}")):
                n = x.metadata["step"]; cv = x.checkpoint["channel_values"]
                assert cv["small"] == f"{MARKER}{n}" and len(cv["list"]) == n+1 and cv["large"][0].endswith(MARKER*(n+1))
            assert is_sealed(postgres_url, f"t{i}")
        missing = []
        for line in items.read_text().splitlines():
            r, k = line.split()
            it = v.store.get((r, "x"), k)
            if it is None or it.value["u"] != k: missing.append((r,k))
        assert not missing, missing[:5]
        for r in "abcdefgh":
            assert len(v.store.search((r,), limit=100000)) >= 60
    assert rows_with(postgres_url, MARKER) == set()
    assert sql(postgres_url, "SELECT count(*) FROM store WHERE strpos(value::text, 'MARKER') > 0 OR right(coalesce(vat_type,''), 3) <> 'gcm'") == [(0,)]
    assert redis_holds(redis_url, MARKER) == set()
