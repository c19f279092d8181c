import os, time, threading, asyncio
import psycopg, pytest, redis
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed,
    rows_with, redis_holds, lose, store, kept, later, EAX_KEY)
from langgraph_vat._ops import seal_existing as sealing, seal_items, plain as plainmod


def slow_items(monkeypatch, seconds):
    orig = seal_items._sealed
    def s(items, root, target, row):
        time.sleep(seconds); return orig(items, root, target, row)
    monkeypatch.setattr(seal_items, "_sealed", s)


def test_ttl_sync(store, postgres_url, monkeypatch):
    plain = store(sealed=False)
    for n in range(300): plain.put(("a",), f"k{n}", {"t": MARKER}, ttl=100)
    slow_items(monkeypatch, 0.01)
    reader = store()
    errors, reads, stop = [], [0], threading.Event()
    def run(i):
        n = i
        while not stop.is_set():
            n = (n*7+13) % 300
            try:
                assert reader.get(("a",), f"k{n}", refresh_ttl=bool(i%4)).value == {"t": MARKER}
                reads[0] += 1
            except Exception as e: errors.append(repr(e)[:150])
    ths = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    [t.start() for t in ths]; time.sleep(0.3)
    print(store().seal_existing()); time.sleep(0.5); stop.set(); [t.join() for t in ths]
    print("reads", reads, "errors", len(errors), errors[:3])


async def test_ttl_async(store, postgres_url, monkeypatch):
    plain = store(sealed=False)
    for n in range(300): plain.put(("a",), f"k{n}", {"t": MARKER}, ttl=100)
    slow_items(monkeypatch, 0.01)
    reader = store(); sealer = store()
    errors, reads, stop = [], [0], threading.Event()
    async def run(i):
        n = i
        while not stop.is_set():
            n = (n*7+13) % 300
            try:
                r = await reader.aget(("a",), f"k{n}", refresh_ttl=bool(i%4))
                assert r.value == {"t": MARKER}
                reads[0] += 1
            except Exception as e: errors.append(repr(e)[:150])
    tasks = [asyncio.create_task(run(i)) for i in range(14)]
    await asyncio.sleep(.3)
    t = asyncio.to_thread(sealer.seal_existing); print(await t)
    await asyncio.sleep(.5); stop.set(); await asyncio.gather(*tasks)
    print("reads", reads, "errors", len(errors), errors[:3])
    await reader.aclose()


def test_cancelled_second(start, postgres_url, redis_url, monkeypatch):
    """loss: aprune cancelled while waiting; writer acks; writer killed; other flushes"""
    plain = start(sealed=False)
    config = grow(plain, at(), 3); plain.flush()
    one, two, writer = start(), start(), start()
    writer.get_tuple(at())
    orig = sealing.seal_thread; ev = threading.Event()
    async def slow(session, thread_id, sealer):
        if not ev.is_set(): ev.set(); time.sleep(3)
        return await orig(session, thread_id, sealer)
    monkeypatch.setattr(sealing, "seal_thread", slow)
    done = []
    t = threading.Thread(target=lambda: done.append(one.threads.seal_existing())); t.start()
    ev.wait(); time.sleep(.2)
    async def m():
        try: await asyncio.wait_for(two.aprune(["t"]), 0.5)
        except Exception as e: print("two", repr(e)[:150])
        await two.aclose()
    asyncio.run(m())
    put(writer, config, 3); print("acked while sealing, sealed yet:", done)
    writer._shared.copies._threads.clear()  # kill -9
    t.join(); print(done)
    time.sleep(6)
    s = start(); s.flush(); print(numbers(s))


def test_long_seal_reader(start, postgres_url, redis_url, monkeypatch):
    plain = start(sealed=False)
    config = grow(plain, at(), 3); plain.flush()
    one = start(timeout_s=2.0); reader = start(timeout_s=2.0); other=start(timeout_s=2.0)
    reader.get_tuple(at())
    orig = sealing.seal_thread; ev = threading.Event()
    async def slow(session, thread_id, sealer):
        if not ev.is_set(): ev.set(); time.sleep(9)
        return await orig(session, thread_id, sealer)
    monkeypatch.setattr(sealing, "seal_thread", slow)
    t = threading.Thread(target=lambda: print(one.threads.seal_existing())); t.start(); ev.wait()
    for f in (lambda: reader.get_tuple(at()), lambda: put(other, config, 3), lambda: list(reader.list(at()))):
        t0 = time.time()
        try: f(); print("ok", time.time()-t0)
        except Exception as e: print(repr(e)[:200], time.time()-t0)
    t.join()
    print(numbers(start()), reader.get_tuple(at()).metadata["step"])


def test_legacy_fuzz():
    from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as LE
    le = LE.from_pycryptodome_aes(key=EAX_KEY); s = LegacySerializer(EAX_KEY)
    t, d = le.dumps_typed({"a": 1})
    ours = StrictSerializer().dumps_typed({"a":1})
    for ty, da in [("msgpack+aes", d), ("json+aes", d), ("pickle+aes", d), ("bytes+aes", d), ("null+aes", d), ("+aes", d), ("aes", d), ("msgpack+aes+aes", d),
                   ("msgpack+aes+foo", d), ("msgpack+AES", d), ("msgpack", d), ("msgpack+xyz", d), ("msgpack+aes+aes256gcm", d), ("msgpack+aes+vat.zstd", d), ("empty+aes", d),
                   ("msgpack+aes", b""), ("msgpack+aes", ours[1]), ("msgpack+aes", d[:20]), ("msgpack+aes", None), ("msgpack+aes", memoryview(d)), ("msgpack+aes", bytearray(d)), ("bytearray+aes", d)]:
        try: print(ty, repr(s.loads_typed((ty, da)))[:60])
        except VatError as e: print(ty, "VAT", type(e).__name__, str(e)[:100])
        except BaseException as e: print(ty, "!!!", repr(e)[:120])
    import copy, pickle
    for f in (copy.copy, copy.deepcopy, pickle.dumps):
        try: f(s); print(f, "ok")
        except Exception as e: print(f, repr(e))
    print(repr(s), s.with_msgpack_allowlist([("a","b")]))


def test_legacy_relabel_in_db(postgres_url, caplog):
    from langgraph.checkpoint.postgres import PostgresSaver
    from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as LE
    with PostgresSaver.from_conn_string(postgres_url) as p:
        p.serde = LE.from_pycryptodome_aes(key=EAX_KEY); p.setup()
        for t in ("ok", "relabel", "trunc", "plain", "foo", "empty", "pickle"): grow(p, at(t), 2)
    u = "UPDATE checkpoint_blobs SET {} WHERE thread_id='{}' AND channel='large'"
    sql(postgres_url, u.format("type='json+aes'", "relabel"))
    sql(postgres_url, u.format("blob=substr(blob,1,40)", "trunc"))
    sql(postgres_url, u.format("type='msgpack'", "plain"))
    sql(postgres_url, u.format("type='msgpack+aes+foo'", "foo"))
    sql(postgres_url, u.format("type='empty'", "empty"))
    sql(postgres_url, u.format("type='pickle+aes'", "pickle"))
    o = dict(keyring=KEYRING, accept_plaintext=soon(), serde=LegacySerializer(EAX_KEY))
    with HybridSaver.from_conn_string(postgres_url, **o) as s:
        def look():
            for t in ("ok", "relabel", "trunc", "plain", "foo", "empty", "pickle"):
                try: print(t, len(states(s, t)), is_sealed(postgres_url, t))
                except AssertionError: print(t, "ASSERT mixed", types(postgres_url, t))
                except Exception as e: print(t, type(e).__name__, str(e)[:120])
        look(); print(s.threads.seal_existing()); look()
        print([r.getMessage() for r in caplog.records])
    # without legacy key, a sealed saver
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING) as s:
        print(len(states(s, "ok")))
