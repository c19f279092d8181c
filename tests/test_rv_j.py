import asyncio, os, time, threading, random
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypedDict, Any
import psycopg, pytest, redis
from langgraph.graph import START, StateGraph
from langgraph.store.base import PutOp, GetOp, SearchOp
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer as LE
from langgraph_vat import *
from langgraph_vat._ops import seal_existing as sealing
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept, EAX_KEY, encrypted)

def test_seal_without_legacy(postgres_url, encrypted, caplog):
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon()) as s:
        try: states(s)
        except Exception as e: print("read", repr(e)[:150])
        print(s.threads.seal_existing(), types(postgres_url), [r.getMessage() for r in caplog.records])
        try: states(s)
        except Exception as e: print("read", repr(e)[:250])
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon(), serde=LegacySerializer(EAX_KEY)) as s:
        print(s.threads.seal_existing(), len(states(s))) 
        print(s.threads.reseal(), types(postgres_url))

def test_wrapped_legacy(postgres_url, encrypted):
    serde = EncryptedSerializer(KEYRING, LegacySerializer(EAX_KEY))
    with HybridSaver.from_conn_string(postgres_url, serde=serde, accept_plaintext=soon()) as s:
        print(len(states(s)), s.threads.seal_existing(), types(postgres_url), len(states(s)))
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING) as s:
        try: print(len(states(s)))
        except Exception as e: print("after step 4", repr(e)[:150])

def test_copy_aes(postgres_url, encrypted):
    for serde in (LegacySerializer(EAX_KEY), None):
        with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, serde=serde, accept_plaintext=soon()) as s:
            try: s.copy_thread("t", f"c{serde is None}"); print(types(postgres_url, f"c{serde is None}"))
            except Exception as e: print(repr(e)[:150])

def test_deadlocks(store, postgres_url):
    plain = store(sealed=False)
    for r in range(3):
        for n in range(800): plain.put(("a", f"n{n%5}"), f"k{n}", {"t": MARKER}, ttl=100)
    stop, errs, done = threading.Event(), [], [0]
    ws = [store() for _ in range(4)]
    def run(i):
        d = random.Random(i); s = ws[i % 4]
        while not stop.is_set():
            try:
                x = d.random()
                if x < .3: s.search(("a",), limit=300, offset=d.randrange(300))
                elif x < .6: s.batch([PutOp(("a", f"n{n%5}"), f"k{n}", {"t": MARKER, "w": i}, ttl=100) for n in d.sample(range(800), 60)])
                elif x < .8: s.batch([GetOp(("a", f"n{n%5}"), f"k{n}") for n in d.sample(range(800), 60)])
                elif x < .9: s.batch([PutOp(("a", f"n{n%5}"), f"k{n}", None) for n in d.sample(range(700, 800), 30)])
                else: s.batch([GetOp(("a", f"n{n%5}"), f"k{n}") for n in d.sample(range(800), 20)] + [PutOp((f"r{d.randrange(4)}",), "x", {"t": MARKER}), PutOp(("a", "n1"), "k1", {"t": MARKER})])
                done[0] += 1
            except Exception as e: errs.append(repr(e)[:160])
    ths = [threading.Thread(target=run, args=(i,)) for i in range(8)]; [t.start() for t in ths]
    time.sleep(1); n0 = len(errs); d0 = done[0]
    try: t0 = time.time(); print(store().seal_existing(), time.time() - t0)
    except Exception as e: print("SEAL", repr(e))
    time.sleep(2); stop.set(); [t.join() for t in ths]
    print("before", n0, d0, "all", len(errs), done, set(errs))
    assert kept(postgres_url, "a") == {True}

def test_delta_postgres_saver(postgres_url):
    from langgraph.channels import DeltaChannel
    class D(TypedDict):
        msgs: Annotated[list, DeltaChannel(lambda a, ws: (a or []) + [y for w in ws for y in w], list, snapshot_frequency=3)]
        s: str
        m: Annotated[list, lambda a, b: a + b]
    b = StateGraph(D).add_node("n", lambda s: {"msgs": [MARKER + str(len(s["msgs"]))], "s": MARKER, "m": [MARKER]}).add_edge(START, "n")
    cfg = {"configurable": {"thread_id": "t"}}
    with PostgresSaver.from_conn_string(postgres_url) as p:
        p.setup(); g = b.compile(checkpointer=p)
        for i in range(7): r = g.invoke({"msgs": [MARKER]}, cfg)
        h = [x.values for x in g.get_state_history(cfg)]
    o = dict(keyring=KEYRING, accept_plaintext=soon())
    with HybridSaver.from_conn_string(postgres_url, **o) as s:
        g = b.compile(checkpointer=s)
        assert [x.values for x in g.get_state_history(cfg)] == h
        r = g.invoke({"msgs": ["y"]}, cfg); h = [x.values for x in g.get_state_history(cfg)]
        print(s.threads.seal_existing(), rows_with(postgres_url, MARKER))
        assert [x.values for x in g.get_state_history(cfg)] == h
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING) as s:
        assert [x.values for x in b.compile(checkpointer=s).get_state_history(cfg)] == h

def test_forgotten_plain_process_hot(start, postgres_url, redis_url, caplog):
    """a plain process that was left on: what does it see and lose"""
    plain = start(sealed=False); c = grow(plain, at(), 2); plain.flush(); c = grow(plain, c, 2, first=2)
    print(start().threads.seal_existing())
    for f in (lambda: put(plain, c, 4), lambda: plain.get_tuple(at()), lambda: list(plain.list(None)), lambda: plain.flush()):
        try: print("OK", str(f())[:60])
        except Exception as e: print(type(e).__name__, str(e)[:120])
    print(numbers(start()))
    put(plain, at("newplain"), 0); plain.flush()
    print(is_sealed(postgres_url, "newplain"))

def test_put_shred_searchable(store, postgres_url):
    """put encoded by a key that another process destroys; then label is used again"""
    s, o = store(), store()
    s.put(("a",), "k", {"t": 1}); s.put(("a",), "hold", {"t": 1}); o.get(("a",), "k")
    with psycopg.connect(postgres_url) as c:
        c.execute("SELECT 1 FROM store WHERE key='k' FOR UPDATE"); res = []
        t = threading.Thread(target=lambda: (s.put(("a",), "k", {"t": 2}), res.append("acked"))); t.start(); time.sleep(.4)
        o.shred("a"); c.commit(); t.join(); print(res)
    o.delete(("a",), "hold")
    try: o.delete(("a",), "k"); o.put(("a",), "z", {"t": 3}); print("reuse ok")
    except Exception as e: print(repr(e)[:100])
