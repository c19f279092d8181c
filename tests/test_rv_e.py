import time, threading
from concurrent.futures import ThreadPoolExecutor
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept)
from langgraph_vat._ops import items as itemsmod

def test_two_sealers(start, postgres_url, caplog):
    plain = start(sealed=False)
    for n in range(60): grow(plain, at(f"t{n}"), 4)
    plain.flush()
    sealers = [start() for _ in range(3)]
    def run(s):
        try: return s.threads.seal_existing()
        except Exception as e: return repr(e)[:140]
    with ThreadPoolExecutor(3) as p: print(list(p.map(run, sealers)))
    print([s.stats.degraded for s in sealers], caplog.text[:600])

def test_spurious_error(store, postgres_url, monkeypatch):
    plain = store(sealed=False)
    for k in "xy": plain.put(("a",), k, {"t": MARKER}, ttl=100)
    reader, sealer = store(), store()
    orig, n = itemsmod._refresh, []
    async def refresh(session, rows):
        if not n:
            n.append(1)
            sealer.seal_existing()
            assert reader.get(("a",), "y", refresh_ttl=False)   # another thread of this process
        return await orig(session, rows)
    monkeypatch.setattr(itemsmod, "_refresh", refresh)
    try: print(reader.get(("a",), "x").value)
    except Exception as e: print(repr(e)[:150])
