"""scratch"""
import os, time, threading, asyncio
from typing import Any
import psycopg, pytest, redis
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.base import empty_checkpoint
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed,
    rows_with, redis_holds, lose, store, kept, later, EAX_KEY)
from langgraph_vat._ops import seal_existing as sealing
from langgraph_vat._io.protocols import HotTierError
from langgraph_vat._hot import scripts
from langgraph_vat._io.driver import drive


def test_dead_plain_process_and_redis_blip(start, postgres_url, redis_url, caplog):
    """journal of a dead process; Redis fails once while sealer reads it, and is well then"""
    plain = start(sealed=False)
    config = grow(plain, at(), 1)
    plain.flush()
    grow(plain, config, 3, first=1)
    plain._shared.copies._threads.clear()   # kill -9
    saver = start(epoch_ttl_s=0.2)
    backend = saver._life.blocking()
    hot = backend.hot
    orig = type(hot).script
    n = []
    async def script(self, which, keys, args):
        if which is scripts.JOURNAL and not n:
            n.append(1)
            raise HotTierError("blip")
        return await orig(self, which, keys, args)
    import unittest.mock as m
    with m.patch.object(type(hot), "script", script):
        try:
            print("sealed", saver.threads.seal_existing())
        except Exception as e:
            print("ERR", repr(e))
    print("blips", n)
    time.sleep(3)
    fresh = start()
    fresh.flush()
    print("steps", numbers(fresh))
    print(caplog.text)
    assert numbers(fresh) == [3,2,1,0]


def test_heads_of_deleted_threads(start, postgres_url, redis_url):
    plain = start(sealed=False)
    grow(plain, at("gone"), 2); grow(plain, at("t"), 1)
    plain.flush()
    plain.get_tuple(at("gone"))
    plain.delete_thread("gone")
    saver = start()
    print(saver.threads.seal_existing())
    print("redis holds", redis_holds(redis_url, MARKER))
    with redis.Redis.from_url(redis_url) as c:
        print([(k, c.ttl(k)) for k in redis_holds(redis_url, MARKER)])
    assert not redis_holds(redis_url, MARKER)


def test_heads_of_namespaces_that_went(start, postgres_url, redis_url):
    plain = start(sealed=False)
    put(plain, at("t"), 1, run_id="r1")
    put(plain, at("t", "sub:1"), 2, run_id="r2")
    plain.flush(); plain.get_tuple(at("t", "sub:1"))
    plain.delete_for_runs(["r2"])
    saver = start()
    print(saver.threads.seal_existing())
    print("redis holds", redis_holds(redis_url, MARKER))
    assert not redis_holds(redis_url, MARKER)


def test_orphan_blobs(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.setup()
        grow(plain, at("t"), 2); grow(plain, at("pruned"), 2)
    sql(postgres_url, "DELETE FROM checkpoints WHERE thread_id='pruned'")
    sql(postgres_url, "DELETE FROM checkpoint_writes WHERE thread_id='pruned'")
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon()) as s:
        print(s.threads.seal_existing(), s.threads.seal_existing())
    print(rows_with(postgres_url, MARKER))
    assert not rows_with(postgres_url, MARKER)


def test_empty_thread_id(postgres_url):
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.setup()
        grow(plain, at(""), 2)
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon()) as s:
        try:
            print("read", s.get_tuple(at("")) is not None)
        except Exception as e: print(repr(e))
        print(s.threads.seal_existing(), s.threads.seal_existing())
    print(rows_with(postgres_url, MARKER))
    assert not rows_with(postgres_url, MARKER)


def test_big_numbers_metadata(postgres_url, caplog):
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        plain.setup()
        c = {**empty_checkpoint()}
        c["channel_values"]={"n": 10**30, "f": 1e30, "x": 1.5e300}
        c["channel_versions"]={k: plain.get_next_version(None,None) for k in c["channel_values"]}
        plain.put(at("t"), c, {"source":"loop","step":1,"score":1e22}, c["channel_versions"])
        c = {**empty_checkpoint()}
        plain.put(at("u"), c, {"source":"loop","step":1,"score":2**70}, {})
        before = [(s[2],s[3]) for t in "tu" for s in states(plain,t)]
    with HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon()) as s:
        print(before)
        print([(x[2],x[3]) for t in "tu" for x in states(s,t)])
        done = s.threads.seal_existing()
        print(done); print(caplog.text)
        after = [(x[2],x[3]) for t in "tu" for x in states(s,t)]
        print(after)
    assert done.left == 0 and after == before


def test_big_numbers_store(store, postgres_url, caplog):
    from langgraph.store.postgres import PostgresStore
    with PostgresStore.from_conn_string(postgres_url) as p:
        p.setup()
        p.put(("a","b"), "k", {"f": 1e22, "t": "x", "i": 2**70})
        print(p.get(("a","b"), "k").value)
    s = store()
    print(s.get(("a","b"), "k").value)
    d = s.seal_existing(); print(d, caplog.text)
    print(s.get(("a","b"), "k").value)
    assert d.left == 0


def test_keyringless_store_puts_into_sealed_root(store, postgres_url):
    plain = store(sealed=False)
    plain.put(("a",), "k", {"t": MARKER})
    s = store()
    assert s.seal_existing().keys == 1
    try:
        plain.put(("a",), "k2", {"t": MARKER})
        print("put acked in the clear")
    except Exception as e: print("refused", repr(e))
    try: plain.put(("a",), "k", {"t": MARKER+"x"}); print("overwrote sealed")
    except Exception as e: print("refused", repr(e))
    try: print(len(s.search(("a",))))
    except Exception as e: print("search", repr(e))
    print(s.seal_existing())
    try: print(s.get(("a",), "k2"))
    except Exception as e: print("get", repr(e))


def test_expired_items_block(store, postgres_url):
    plain = store(sealed=False)
    plain.put(("a",), "k", {"t": MARKER}, ttl=0.001)
    time.sleep(0.3)
    w = store()
    assert w.search(("a",)) == []
    w.put(("a",), "k2", {"t": MARKER})
    print("kept within the window", kept(postgres_url, "a"))
    w.delete(("a",), "k2")
    n = store(window=False)
    try: n.put(("a",), "k3", {"t": MARKER}); print("ok")
    except Exception as e: print("refused", e)
    try: n.search(("a",)); print("ok")
    except Exception as e: print("refused", e)


def test_window_filter_finds_plain(store, postgres_url):
    plain = store(sealed=False)
    plain.put(("a",), "k", {"order_id": "1", "t": MARKER})
    plain.put(("a",), "v", {"order_id": "1", "vat_blind": {"order_id": "0"*32}})
    w = store(filterable_fields=("order_id",))
    print([i.key for i in w.search(("a",), filter={"order_id": "1"})])
    w.put(("b",), "k", {"order_id":"1"})
    print([i.key for i in w.search((), filter={"order_id": "1"})])
    print(w.seal_existing())
    print([i.key for i in w.search(("a",), filter={"order_id": "1"})])
    print(w.get(("a",), "v").value)


def test_copy_source_deleted_meanwhile(start, postgres_url, monkeypatch):
    s = start(); grow(s, at(), 2); s.flush(); other = start(); other.get_tuple(at())
    from langgraph_vat._ops import retention
    orig = retention.open_tokens
    async def meddle(shared, backend):
        other.delete_thread("t")
        return await orig(shared, backend)
    monkeypatch.setattr(retention, "open_tokens", meddle)
    try: s.copy_thread("t", "u"); print("copied nothing")
    except Exception as e: print(repr(e))
