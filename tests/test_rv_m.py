import os, time, random, asyncio, multiprocessing, sys, threading
import pytest, psycopg, redis as redislib
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds)
from tests.test_rv_d import one_put
ctx = multiprocessing.get_context("fork")

def writer(pg, rd, threads, path, stop, every, storage):
    fd = os.open(path, os.O_APPEND|os.O_CREAT|os.O_WRONLY)
    saver = HybridSaver.from_conn_string(pg, redis=rd, flush_every=every, flush_after=0.5, storage=storage, keyring=KEYRING, accept_plaintext=soon(), epoch_ttl_s=0.3, timeout_s=2.0)
    last = {}
    while not os.path.exists(stop):
        for t in threads:
            try:
                cur = saver.get_tuple(at(t)); n = cur.metadata["step"] + 1
                cp, md, v = one_put(saver, cur.config, n, t)
                c = saver.put(cur.config, cp, md, v)
                os.write(fd, f"{t} {c['configurable']['checkpoint_id']}\n".encode())
                saver.put_writes(c, [("small", MARKER)], "task")
            except (UnavailableError,) as e: time.sleep(.1)
            except Exception as e:
                os.write(2, f"WRITER {t} {type(e).__name__} {str(e)[:300]}\n".encode()); time.sleep(.2)
    for _ in range(20):
        try: saver.flush(); break
        except Exception as e: os.write(2, f"W flush {str(e)[:100]}\n".encode()); time.sleep(.5)
    saver.close(); os._exit(0)

@pytest.mark.parametrize("every,storage", [(8, "compact"), (1, "compact"), (8, "compatible")])
@pytest.mark.parametrize("fault", ["flushall", "kill"])
def test_redis_faults(own_redis, postgres_url, every, storage, fault, tmp_path):
    dice = random.Random(3); rd = own_redis.url; T = 200
    with Vat.connect(postgres_url, rd, flush_every=8) as plain:
        for i in range(T):
            c = at(f"t{i}")
            for n in range(3):
                cp, md, v = one_put(plain.checkpointer, c, n, ""); c = plain.checkpointer.put(c, cp, md, v)
    acks, stop = tmp_path/"acks", str(tmp_path/"stop"); acks.touch()
    procs = [ctx.Process(target=writer, args=(postgres_url, rd, [f"t{i}" for i in range(T) if i%3==k], str(acks), stop, every, storage)) for k in range(3)]
    [x.start() for x in procs]; time.sleep(1)
    out, halt = [], threading.Event()
    def seal():
        with HybridSaver.from_conn_string(postgres_url, redis=rd, keyring=KEYRING, accept_plaintext=soon(), epoch_ttl_s=.3, flush_after=.5, timeout_s=2.0) as s:
            while not halt.is_set():
                try: out.append(tuple(s.threads.seal_existing()))
                except UnavailableError: out.append("U")
                except Exception as e: out.append(repr(e)[:200])
                time.sleep(.1)
    t = threading.Thread(target=seal); t.start()
    for _ in range(5):
        time.sleep(dice.uniform(0.05, 2))
        if fault == "flushall":
            with redislib.Redis.from_url(rd) as c: c.flushall()
        else: own_redis.kill(); time.sleep(dice.uniform(0, .4)); own_redis.start()
    time.sleep(5); open(stop, "w").close()
    [x.join() for x in procs]; time.sleep(.5); halt.set(); t.join()
    print("sealer", [o for i, o in enumerate(out) if i == 0 or o != out[i-1]][:20])
    leaks = redis_holds(rd, MARKER)
    with HybridSaver.from_conn_string(postgres_url, redis=rd, keyring=KEYRING, accept_plaintext=soon()) as s:
        for _ in range(20):
            try:
                s.flush(); d = s.threads.seal_existing()
                if d == (0,0,0): break
            except UnavailableError: time.sleep(.5)
        bad = {}
        lines = [l.split() for l in acks.read_text().splitlines()]
        for i in range(T):
            have = {x.config["configurable"]["checkpoint_id"] for x in s.list(at(f"t{i}"))}
            lost = [b for a, b in lines if a == f"t{i}" and b not in have]
            if lost: bad[f"t{i}"] = lost
            assert is_sealed(postgres_url, f"t{i}")
    print("RES", fault, every, storage, "acked", len(lines), "LOST", bad, "PG", rows_with(postgres_url, MARKER), "redis plain heads", len(leaks), list(leaks)[:3], "after", len(redis_holds(rd, MARKER)))
    assert not bad
