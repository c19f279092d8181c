"""graphs, interrupts, subgraphs, delta, copies, tenants, filterable, keys"""
import asyncio, os, time, operator, threading, subprocess, sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypedDict, Any
import pytest
from langgraph.graph import START, StateGraph, MessagesState
from langgraph.types import interrupt, Command, Send
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept, later)

class S(TypedDict, total=False):
    items: Annotated[list, operator.add]
    big: str
    none: Any

def graph(saver):
    def sub_a(s): 
        x = interrupt({"q": MARKER})
        return {"items": [MARKER + x]}
    sub = StateGraph(S).add_node("a", sub_a).add_edge(START, "a").compile()
    def n1(s): return {"items": [MARKER], "big": MARKER*3000, "none": None}
    def fan(s): return [Send("w", {"items": [], "big": MARKER + str(i)}) for i in range(3)]
    def w(s): return {"items": [s["big"]]}
    b = StateGraph(S).add_node("n1", n1).add_node("w", w).add_node("sub", sub)
    b.add_edge(START, "n1"); b.add_conditional_edges("n1", fan, ["w"]); b.add_edge("w", "sub")
    return b.compile(checkpointer=saver)

@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("storage", ["compact", "compatible"])
def test_interrupt_subgraph_sealed_between(start, postgres_url, redis_url, every, storage):
    o = dict(flush_every=every, storage=storage)
    plain = start(sealed=False, **o)
    cfg = {"configurable": {"thread_id": "t"}, "metadata": {"user": MARKER}}
    r = graph(plain).invoke({"items": [MARKER]}, cfg); assert "__interrupt__" in r
    hist = [(h.values, h.next, h.metadata, [t.interrupts for t in h.tasks]) for h in graph(plain).get_state_history(cfg)]
    old = start(**o); og = graph(old); og.get_state(cfg, subgraphs=True)
    sealer = start(**o); print(sealer.threads.seal_existing())
    assert [(h.values, h.next, h.metadata, [t.interrupts for t in h.tasks]) for h in og.get_state_history(cfg)] == hist
    assert not rows_with(postgres_url, MARKER) and not redis_holds(redis_url, MARKER)
    r = og.invoke(Command(resume="yes"), cfg)
    assert r["items"][-1] == MARKER+"yes"
    old.flush(); assert is_sealed(postgres_url)
    assert not rows_with(postgres_url, MARKER) and not redis_holds(redis_url, MARKER)
    nw = start(window=False, **o); st = graph(nw).get_state(cfg); assert st.values["items"] == r["items"]
    nw.copy_thread("t", "copy"); assert is_sealed(postgres_url, "copy")
    nw.prune(["t"]); assert len(numbers(nw)) >= 1
    h = list(graph(nw).get_state_history({"configurable": {"thread_id": "copy"}})); 
    # time travel on copy
    g = graph(nw); e = [x for x in h if x.next == ("n1",)][0]
    r2 = g.invoke(None, e.config); assert "__interrupt__" in r2
    nw.delete_thread("t"); assert nw.get_tuple(at()) is None

def test_delta(start, postgres_url, redis_url):
    try: from langgraph.channels import DeltaChannel
    except ImportError: pytest.skip("no delta")
    class D(TypedDict): 
        msgs: Annotated[list, DeltaChannel(lambda a, b: (a or []) + [y for x in b for y in x], snapshot_frequency=5)] if False else list
    import inspect; print(inspect.signature(DeltaChannel.__init__))

def test_tenants_meta_tokens(start, postgres_url, redis_url):
    plain = start(sealed=False)
    for tenant in ("a", "b"):
        put(plain.scoped(tenant), at("t"), 1, user="ada")
    put(plain, at("t"), 1, user="ada"); put(plain, at("u"), 2, user="bob"); plain.flush()
    s = start(filterable_metadata=("user",))
    print(s.scoped("a").threads.seal_existing(), sql(postgres_url, "SELECT thread_id, data_key IS NOT NULL FROM vat_threads ORDER BY 1"))
    assert [x.metadata["step"] for x in s.scoped("a").list(None, filter={"user":"ada"})] == [1]
    assert [x.metadata["step"] for x in s.scoped("b").list(None, filter={"user":"ada"})] == [1]
    assert [x.metadata["step"] for x in s.list(None, filter={"user":"ada"})] == [1]
    print(s.threads.seal_existing())
    for v in (s, s.scoped("a"), s.scoped("b")): assert [x.metadata["step"] for x in v.list(None, filter={"user":"ada"})] == [1]
    print(sql(postgres_url, "SELECT thread_id, metadata FROM checkpoints ORDER BY 1"))
    # copy across plain -> within tenant
    n = start(window=False, filterable_metadata=("user",)); n.scoped("a").copy_thread("t", "t2"); assert [x.metadata["user"] for x in n.scoped("a").list(at("t2"))] == ["ada"]

def test_doc_session(postgres_url, redis_url, tmp_path, monkeypatch, caplog):
    os.chdir(tmp_path)
    with Vat.connect(postgres_url, redis_url) as v:
        v.store.put(("memories", "u"), "k", {"order_id": "o1"})
        put(v.checkpointer, at(), 1, user_id="ada")
    Keyring.generate().save("keys"); print(oct(os.stat("keys").st_mode))
    try: Keyring.generate().save("keys")
    except Exception as e: print("save twice", repr(e))
    keyring = Keyring.from_file("keys")
    with Vat.connect(postgres_url, redis_url, keyring=keyring) as v:
        for f in (lambda: v.seal_existing(), lambda: v.checkpointer.get_tuple(at()), lambda: v.store.get(("memories","u"),"k"), lambda: v.store.put(("memories","u"),"k", {}), lambda: v.store.delete(("memories","u"),"k2")):
            try: print("OK", f())
            except Exception as e: print(type(e).__name__, e)
    for bad in (datetime.now(), "2027-01-31", datetime.now(UTC)-timedelta(1)):
        try:
            with Vat.connect(postgres_url, redis_url, keyring=keyring, accept_plaintext=bad) as v: print(v.seal_existing())
        except Exception as e: print(type(e).__name__, e)
    try: 
        with Vat.connect(postgres_url, redis_url, accept_plaintext=soon()) as v: print("no keyring + window", v.checkpointer.get_tuple(at()) is not None); v.seal_existing()
    except Exception as e: print(type(e).__name__, e)
    with Vat.connect(postgres_url, redis_url, keyring=keyring, accept_plaintext=soon(), filterable_metadata=("user_id",), filterable_fields=("order_id",)) as v:
        print(v.seal_existing(), v.seal_existing(), repr(v.seal_existing()))
        print(v.store.search(("memories",), filter={"order_id": "o1"}), [x.metadata for x in v.checkpointer.list(None, filter={"user_id": "ada"})])
    with Vat.connect(postgres_url, redis_url, keyring=keyring) as v:
        assert v.checkpointer.get_tuple(at()); assert v.store.get(("memories","u"),"k")
        Keyring.from_file("keys").with_key("2027").save("keys-1"); Keyring.from_file("keys-1").with_primary("2027").save("keys-2")
    with Vat.connect(postgres_url, redis_url, keyring=Keyring.from_file("keys-2")) as v:
        print(v.rotate(), v.rotate())
        print(v.reseal(max_age_s=90*86400), v.reseal())
    Keyring.from_file("keys-2").without("k1").save("keys-3")
    monkeypatch.setenv("LANGGRAPH_VAT_KEYS", open("keys-3").read())
    with Vat.connect(postgres_url, redis_url, keyring=Keyring.from_env().with_cipher("chacha20poly1305")) as v:
        print(v.reseal(), types(postgres_url))
        assert v.store.get(("memories","u"),"k").value == {"order_id": "o1"}
        v.checkpointer.threads.shred("t"); v.store.shred("memories")
        for f in (lambda: v.checkpointer.get_tuple(at()), lambda: v.store.get(("memories","u"),"k"), lambda: list(v.checkpointer.list(None)), lambda: v.store.search(("memories",)), lambda: v.store.shred("memories"), lambda: v.store.put(("memories","u"),"z",{"a":1}), lambda: v.seal_existing()):
            try: print("OK", f())
            except Exception as e: print(type(e).__name__, e)
    with Vat.connect(postgres_url, redis_url, keyring=Keyring.from_file("keys")) as v:
        v2 = None
        for f in (lambda: v.rotate(), lambda: v.seal_existing(), lambda: put(v.checkpointer, at("new"), 1)):
            try: print("OK", str(f())[:100])
            except Exception as e: print(type(e).__name__, e)
    # with the saver alone
    with HybridSaver.from_conn_string(postgres_url, redis=redis_url, keyring=keyring, accept_plaintext=soon()) as s:
        try: print(s.seal_existing())
        except Exception as e: print(type(e).__name__, e)

def test_key_server(postgres_url, tmp_path):
    import tempfile
    from langgraph_vat.kms import SocketKeyWrapper
    d = tempfile.mkdtemp(); os.chmod(d, 0o700)
    Keyring.generate().save(f"{d}/keys")
    p = subprocess.Popen([sys.executable, "-m", "langgraph_vat.kms", "--keys", f"{d}/keys", "--socket", f"{d}/s"])
    try:
        time.sleep(2)
        w = SocketKeyWrapper(f"{d}/s")
        with Vat.connect(postgres_url) as v:
            put(v.checkpointer, at(), 1); put(v.checkpointer, at("u"), 1); v.store.put(("a",), "k", {"t": MARKER})
        with Vat.connect(postgres_url, keyring=w, accept_plaintext=soon()) as v:
            print(v.seal_existing())
            assert v.store.get(("a",), "k").value == {"t": MARKER}
            put(v.checkpointer, at("n"), 1)
        p.kill(); p.wait()
        with Vat.connect(postgres_url, keyring=SocketKeyWrapper(f"{d}/s", timeout_s=1) , accept_plaintext=soon()) as v:
            for f in (lambda: v.checkpointer.get_tuple(at()), lambda: v.store.put(("new",), "k", {})):
                try: print("OK", f())
                except Exception as e: print(type(e).__name__, e)
    finally:
        p.kill()
