import os, time, threading, asyncio
from concurrent.futures import ThreadPoolExecutor
import psycopg, pytest, redis
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed,
    rows_with, redis_holds, lose, store, kept, later, EAX_KEY)
from langgraph_vat._ops import seal_existing as sealing, seal_items, plain as plainmod
from langgraph_vat._io.protocols import HotTierError
from langgraph_vat._hot import scripts


def test_ttl_items_read_while_sealed(store, postgres_url):
    plain = store(sealed=False)
    for n in range(2000):
        plain.put(("a",), f"k{n}", {"t": MARKER}, ttl=100)
    reader = store()
    errors, reads, stop = [], [0], threading.Event()
    def run(i):
        n = i
        while not stop.is_set():
            n = (n*7+13) % 2000
            try:
                assert reader.get(("a",), f"k{n}").value == {"t": MARKER}
                reads[0] += 1
            except Exception as e:
                errors.append(repr(e)[:200]); 
    ths = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    [t.start() for t in ths]
    time.sleep(0.5)
    t0=time.time(); print(store().seal_existing(), time.time()-t0)
    time.sleep(0.5); stop.set(); [t.join() for t in ths]
    print("reads", reads, "errors", len(errors), errors[:3])
    assert not errors


def test_nonttl_items_read_while_sealed(store, postgres_url):
    plain = store(sealed=False)
    for n in range(2000):
        plain.put(("a",), f"k{n}", {"t": MARKER})
    reader = store()
    errors, reads, stop = [], [0], threading.Event()
    def run(i):
        n = i
        while not stop.is_set():
            n = (n*7+13) % 2000
            try:
                assert reader.get(("a",), f"k{n}").value == {"t": MARKER}
                assert len(reader.search(("a",), filter={"t": MARKER}, limit=50)) == 50
                reads[0] += 1
            except Exception as e:
                errors.append(repr(e)[:200]); 
    ths = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    [t.start() for t in ths]
    time.sleep(0.5)
    t0=time.time(); print(store().seal_existing(), time.time()-t0)
    time.sleep(0.5); stop.set(); [t.join() for t in ths]
    print("reads", reads, "errors", len(errors), errors[:3])
    assert not errors


def test_second_sealer_times_out_and_reopens(start, postgres_url, redis_url, monkeypatch, caplog):
    """a sealer that waited too long for the lock opens the thread for writers while the first one still seals"""
    plain = start(sealed=False)
    config = grow(plain, at(), 3); plain.flush(); plain.get_tuple(at())
    one, two, writer = start(), start(timeout_s=0.3), start()
    writer.get_tuple(at())
    orig = sealing.seal_thread
    ev = threading.Event()
    async def slow(session, thread_id, sealer):
        if not ev.is_set():
            ev.set(); time.sleep(4)
        return await orig(session, thread_id, sealer)
    monkeypatch.setattr(sealing, "seal_thread", slow)
    done = []
    t = threading.Thread(target=lambda: done.append(one.threads.seal_existing())); t.start()
    ev.wait(); time.sleep(.2)
    try: print("two", two.threads.seal_existing())
    except Exception as e: print("two", repr(e)[:150])
    t0=time.time()
    c = put(writer, config, 3); print("put took", time.time()-t0, done)
    print("redis in between", redis_holds(redis_url, MARKER))
    t.join(); print(done)
    print("redis after", redis_holds(redis_url, MARKER), rows_with(postgres_url, MARKER))
    writer.flush()
    print("redis after flush", redis_holds(redis_url, MARKER), rows_with(postgres_url, MARKER))
    print(numbers(start()), is_sealed(postgres_url))
    print("redis after read", redis_holds(redis_url, MARKER))
    print(caplog.text[-1500:])


def test_flushall_midway(start, postgres_url, redis_url, monkeypatch, caplog):
    plain = start(sealed=False)
    config = grow(plain, at(), 3); grow(plain, at("t","sub"), 1); plain.flush()
    one, writer = start(), start()
    writer.get_tuple(at()); writer.get_tuple(at("t","sub"))
    orig = sealing.seal_thread
    async def slow(session, thread_id, sealer):
        with redis.Redis.from_url(redis_url) as c: c.flushall()
        assert writer.get_tuple(at()) is not None
        assert writer.get_tuple(at("t","sub")) is not None
        put(writer, config, 3)
        return await orig(session, thread_id, sealer)
    monkeypatch.setattr(sealing, "seal_thread", slow)
    print(one.threads.seal_existing())
    print("redis after", redis_holds(redis_url, MARKER), rows_with(postgres_url, MARKER))
    time.sleep(4)
    try: writer.flush()
    except Exception as e: print(repr(e))
    print(numbers(start()), is_sealed(postgres_url))
    print("redis after flush+read", redis_holds(redis_url, MARKER))
    with redis.Redis.from_url(redis_url) as c:
        print([(k, c.ttl(k)) for k in redis_holds(redis_url, MARKER)])


def test_shred_races_put_waiting_on_row(store, postgres_url):
    s, other = store(), store()
    s.put(("a",), "k", {"t": 1}); other.get(("a",), "k")
    with psycopg.connect(postgres_url) as c:
        c.execute("SELECT 1 FROM store WHERE key='k' FOR UPDATE")
        res = []
        def run():
            try: s.put(("a",), "k", {"t": 2}); res.append("acked")
            except Exception as e: res.append(repr(e))
        t = threading.Thread(target=run); t.start(); time.sleep(.5)
        u = threading.Thread(target=lambda: (other.shred("a"), res.append("shredded"))); u.start(); time.sleep(.5)
        print(res)
        c.commit()
        t.join(); u.join(); print(res)


def test_batch_many_large(start, postgres_url, redis_url):
    plain = start(sealed=False, redis=None)
    config = at()
    import random
    t0=time.time()
    from langgraph.checkpoint.base import empty_checkpoint
    for i in range(1500):
        config = put(plain, config, i)
    print("wrote", time.time()-t0)
    t0=time.time(); s = start(redis=None); d=s.threads.seal_existing(); print(d, time.time()-t0, d.values/(time.time()-t0))
    t0=time.time(); print(s.threads.reseal(), time.time()-t0)
