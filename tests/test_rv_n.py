import time, pytest, datetime, psycopg
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept)

@pytest.mark.parametrize("how", ["vat_exact='\\x81'", "vat_exact=NULL", "vat_type='msgpack+vat.zstd'", "vat_type='pickle'", "metadata='[1]'", "checkpoint='{}'", "checkpoint='[]'", "checkpoint=jsonb_set(checkpoint,'{channel_versions}','null')", "checkpoint=jsonb_set(checkpoint,'{channel_values}','[1]')", "metadata='\"x\"'"])
def test_damaged_metadata(start, postgres_url, how, caplog):
    plain = start(sealed=False, redis=None)
    for t in ("a", "b", "c"): put(plain, at(t), 1, when=datetime.datetime.now())
    sql(postgres_url, f"UPDATE checkpoints SET {how} WHERE thread_id='b'")
    s = start(redis=None)
    try: print("RES", how, s.threads.seal_existing())
    except Exception as e: print("RES", how, "!!!", repr(e)[:160])
    print([(t, is_sealed(postgres_url, t)) for t in "ac"])
    try: print(states(start(redis=None), "b") is not None)
    except Exception as e: print("read b", repr(e)[:100])

@pytest.mark.parametrize("how", ["vat_value='\\x81'", "vat_value=NULL", "vat_type='pickle'", "value='[1]', vat_type=NULL, vat_value=NULL", "value='\"x\"', vat_type=NULL, vat_value=NULL", "vat_type='null'"])
def test_damaged_items(store, postgres_url, how):
    plain = store(sealed=False)
    for r in "abc": plain.put((r,), "k", {"w": datetime.datetime.now()})
    sql(postgres_url, f"UPDATE store SET {how} WHERE prefix='b'")
    s = store(filterable_fields=("w",))
    try: print("RES", how, s.seal_existing())
    except Exception as e: print("RES", how, "!!!", repr(e)[:160])
    print(sql(postgres_url, "SELECT prefix, vat_type FROM store ORDER BY 1"))

def test_class_gone(start, store, postgres_url):
    import sys, types as ty, dataclasses
    m = ty.ModuleType("gone_mod"); sys.modules["gone_mod"] = m
    @dataclasses.dataclass
    class Plan: x: int
    Plan.__module__ = "gone_mod"; Plan.__qualname__ = "Plan"; m.Plan = Plan
    plain = start(sealed=False, redis=None, serde=StrictSerializer(allow=[Plan]))
    for t in ("a", "b", "c"): put(plain, at(t), 1, plan=Plan(1) if t == "b" else 1)
    st = store(sealed=False, serde=StrictSerializer(allow=[Plan]))
    for r in "abc": st.put((r,), "k", {"p": Plan(1) if r == "b" else 1})
    del m.Plan
    for serde in (StrictSerializer(allow=[("gone_mod", "Plan")]), None):
        for f in (lambda: start(redis=None, serde=serde).threads.seal_existing(), lambda: store(serde=serde).seal_existing()):
            try: print("RES", f())
            except Exception as e: print("RES !!!", repr(e)[:200])

def test_delete_after_window(start, postgres_url):
    plain = start(sealed=False); grow(plain, at(), 2); plain.flush()
    s = start(window=False); s.delete_thread("t"); print("RES deleted", plain.get_tuple(at()), sql(postgres_url, "SELECT count(*) FROM checkpoints"))

def test_rewrite_reseal_in_window(start, postgres_url):
    plain = start(sealed=False); c = grow(plain, at(), 20); plain.flush(); b = states(plain)
    s = start(); print(s.threads.rewrite("compatible"), s.threads.rewrite("compact"), s.threads.reseal(), s.threads.rotate())
    assert states(s) == b; print("RES", s.threads.seal_existing(), s.threads.rewrite("compatible"), s.threads.rewrite("compact")); assert states(start(window=False)) == b
