import asyncio, os, time, threading
from typing import Annotated, TypedDict, Any
import psycopg, pytest, redis
from langgraph.graph import START, StateGraph
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as LE
from langgraph_vat import *
from langgraph_vat._ops import seal_existing as sealing
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept, EAX_KEY)

def test_legacy_downgrade(postgres_url, redis_url):
    class S(TypedDict): msgs: Annotated[list, lambda a,b: a+b]
    b = StateGraph(S).add_node("n", lambda s: {"msgs": ["re " + s["msgs"][-1]]}).add_edge(START, "n")
    cfg = {"configurable": {"thread_id": "t"}}
    with PostgresSaver.from_conn_string(postgres_url) as p:
        p.serde = LE.from_pycryptodome_aes(key=EAX_KEY); p.setup()
        b.compile(checkpointer=p).invoke({"msgs": [MARKER]}, cfg)
    print("before", [len(r) for r in [sql(postgres_url, "SELECT 1 FROM checkpoint_blobs WHERE position(%s::bytea in blob) > 0", MARKER.encode())]])
    o = dict(keyring=KEYRING, accept_plaintext=soon(), serde=LegacySerializer(EAX_KEY))
    HybridSaver.from_conn_string(postgres_url, redis=redis_url, **o).enable_hot()
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, **o) as s:
        b.compile(checkpointer=s).invoke({"msgs": ["second " + MARKER]}, cfg)
        s.flush()
        print("after one turn in the window", rows_with(postgres_url, MARKER), redis_holds(redis_url, MARKER), types(postgres_url))
        print(s.threads.seal_existing(), rows_with(postgres_url, MARKER))
        print(b.compile(checkpointer=s).get_state(cfg).values)

def test_delta(start, postgres_url, redis_url):
    from langgraph.channels import DeltaChannel
    class D(TypedDict):
        msgs: Annotated[list, DeltaChannel(lambda a, ws: (a or []) + [y for w in ws for y in w], list, snapshot_frequency=4)]
    b = StateGraph(D).add_node("n", lambda s: {"msgs": [MARKER + str(len(s["msgs"]))]}).add_edge(START, "n")
    cfg = {"configurable": {"thread_id": "t"}}
    plain = start(sealed=False)
    g = b.compile(checkpointer=plain)
    for i in range(7): r = g.invoke({"msgs": [MARKER]}, cfg)
    h = [x.values for x in g.get_state_history(cfg)]
    old = start(); og = b.compile(checkpointer=old); og.get_state(cfg)
    print(start().threads.seal_existing())
    for s in (old, start(), start(window=False)): assert [x.values for x in b.compile(checkpointer=s).get_state_history(cfg)] == h
    r2 = og.invoke({"msgs": ["x"]}, cfg); assert r2["msgs"][:-2] == r["msgs"]; old.flush()
    assert not rows_with(postgres_url, MARKER) and not redis_holds(redis_url, MARKER)
    old.copy_thread("t", "c"); old.prune(["t"]); assert og.get_state(cfg).values == r2
    assert [x.values for x in og.get_state_history({"configurable": {"thread_id": "c"}})][-len(h):] == h

def test_cancel_async_sealer(start, postgres_url, redis_url, monkeypatch):
    plain = start(sealed=False); c = at()
    for i in range(3): c = grow(plain, c, 100, first=i*100)
    plain.flush()
    for d in (0.005, 0.02, 0.05, 0.08, 0.12):
        s, w = start(), start()
        async def m():
            try: print(await asyncio.wait_for(s.threads.aseal_existing(), d))
            except Exception as e: print(d, repr(e)[:80])
            await s.aclose()
        asyncio.run(m())
        print(is_sealed(postgres_url)); t0=time.time(); assert w.get_tuple(at()).metadata["step"] == 299; print(time.time()-t0)
    print(start().threads.seal_existing(), redis_holds(redis_url, MARKER))

@pytest.mark.parametrize("when", ["close", "flush", "heads", "commit"])
def test_redis_killed_in_the_middle(own_redis, start, postgres_url, monkeypatch, when):
    o = dict(redis=own_redis.url, timeout_s=1.0, epoch_ttl_s=0.2)
    plain = start(sealed=False, **o); c = grow(plain, at(), 2); plain.flush(); c = grow(plain, c, 2, first=2)
    live = start(**o); c = put(live, c, 4)
    if True: plain._shared.copies._threads.clear()
    s = start(**o)
    from langgraph_vat._ops import threads as th
    done = []
    def kill():
        if not done: done.append(1); own_redis.kill(); own_redis.start()
    if when == "close":
        orig = th._close
        async def f(*a):
            r = await orig(*a); kill(); return r
        monkeypatch.setattr(th, "_close", f)
    elif when == "heads":
        orig = sealing._drop_heads
        async def f(*a): kill(); return await orig(*a)
        monkeypatch.setattr(sealing, "_drop_heads", f)
    elif when == "commit":
        orig = sealing.seal_thread
        async def f(*a): kill(); return await orig(*a)
        monkeypatch.setattr(sealing, "seal_thread", f)
    else:
        orig = th.flush
        async def f(*a, **k): kill(); return await orig(*a, **k)
        monkeypatch.setattr(th, "flush", f)
    try: print(s.threads.seal_existing())
    except Exception as e: print(repr(e)[:150])
    time.sleep(3)
    for x in (start(**o), live):
        try: x.flush()
        except Exception as e: print("flush", repr(e)[:100])
    for _ in range(5):
        try: print(start(**o).threads.seal_existing()); break
        except UnavailableError as e: print("U"); time.sleep(2)
    print(when, numbers(start(**o)), is_sealed(postgres_url), redis_holds(own_redis.url, MARKER))

def test_new_root_cost(store, postgres_url):
    s = store(); s.put(("a",), "k", {})
    sql(postgres_url, "INSERT INTO store (prefix, key, value) SELECT 'r' || mod(i, 1000) || '.x', 'k' || i, '{}' FROM generate_series(1, 400000) i")
    sql(postgres_url, "INSERT INTO vat_store_keys SELECT 'r' || i, '\\x00' FROM generate_series(0, 999) i"); sql(postgres_url, "ANALYZE store")
    for r in ("new1", "new2", "a", "zz"):
        t0 = time.time(); s.put((r,), "k", {}); print(r, round((time.time()-t0)*1000, 1), "ms")
    from langgraph_vat._durable import items as I
    with psycopg.connect(postgres_url) as c:
        print("\n".join(r[0] for r in c.execute("EXPLAIN " + I.PLAIN_ROOTS, {"roots": ["new9"]}).fetchall()))

def test_store_strange_values(store, postgres_url, caplog):
    from langgraph.store.postgres import PostgresStore
    import datetime, decimal
    plain = store(sealed=False)
    vals = {"nul": {"a": "x\0y"}, "sur": {"a": "\ud800"}, "dt": {"a": datetime.datetime.now()}, "bytes": {"a": b"x"}, "deep": {"a": [[[[1]]]]}, "float": {"a": 1.0, "b": 1e17, "c": float("inf")}, "keys": {"a b": 1, "": 2}, "none": {"a": None}, "empty": {}, "big": {"a": MARKER*100000}, "uni": {"a": "é😀"}}
    for k, v in vals.items():
        try: plain.put(("a",), k, v)
        except Exception as e: print(k, repr(e)[:80])
    before = {i.key: i.value for i in plain.search(("a",), limit=100)}
    s = store(); assert {i.key: i.value for i in s.search(("a",), limit=100)} == before
    print(s.seal_existing(), caplog.text)
    assert {i.key: i.value for i in s.search(("a",), limit=100)} == before
    assert {i.key: i.value for i in store(window=False).search(("a",), limit=100)} == before

def test_list_all_after_window(start, store, postgres_url):
    plain = start(sealed=False); grow(plain, at("p"), 1); s = start(window=False); put(s, at("q"), 1)
    try: print(len(list(s.list(None))))
    except Exception as e: print(repr(e)[:100])
    store(sealed=False).put(("p",), "k", {"a": 1}); st = store(window=False); st.put(("q",), "k", {"a": 1})
    try: print(st.search(()))
    except Exception as e: print(repr(e)[:100])

def test_new_root_plan(store, postgres_url):
    s = store(); s.put(("a",), "k", {})
    with psycopg.connect(postgres_url) as c:
        c.execute("INSERT INTO store (prefix, key, value) SELECT 'r' || mod(i, 1000) || '.x', 'k' || i, '{}' FROM generate_series(1, 400000) i"); c.commit()
        c.execute("ANALYZE store")
        from langgraph_vat._durable import items as I
        for r in c.execute("EXPLAIN ANALYZE " + I.PLAIN_ROOTS, {"roots": ["new9"]}).fetchall(): print("|"+r[0])

def test_legacy_vat_store(postgres_url):
    from langgraph.store.postgres import PostgresStore
    with PostgresStore.from_conn_string(postgres_url) as p:
        p.setup(); p.put(("m","u"), "k", {"t": MARKER}, ttl=60) if False else p.put(("m","u"), "k", {"t": MARKER})
    with Vat.connect(postgres_url, keyring=KEYRING, accept_plaintext=soon(), serde=LegacySerializer(EAX_KEY)) as v:
        print(v.store.get(("m","u"), "k")); v.store.put(("n",), "k", {"d": __import__("datetime").datetime.now()}); print(v.seal_existing())
        print(v.store.get(("m","u"), "k"), v.store.get(("n",), "k"))

async def test_async_vat(postgres_url, redis_url):
    async with Vat.connect(postgres_url, redis_url) as v:
        put_ = [await v.store.aput(("m",), str(i), {"t": MARKER}) for i in range(5)]
    def seed():
        with Vat.connect(postgres_url, redis_url) as v: grow(v.checkpointer, at(), 5)
    await asyncio.to_thread(seed)
    async with Vat.connect(postgres_url, redis_url, keyring=KEYRING, accept_plaintext=soon()) as v:
        rs = await asyncio.gather(*(v.aseal_existing() for _ in range(3)), *(v.store.aput(("m",), f"n{i}", {"t": MARKER}) for i in range(10)), return_exceptions=True)
        print(rs)
        print(len(await v.store.asearch(("m",), limit=100)), (await v.checkpointer.aget_tuple(at())).metadata["step"])
