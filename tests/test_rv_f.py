import time, threading
from concurrent.futures import ThreadPoolExecutor
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds, store, kept)

def test_dead_journals_and_three_sealers(start, postgres_url, redis_url, caplog):
    plain = start(sealed=False)
    N = 120
    for n in range(N): grow(plain, at(f"t{n}"), 3)
    plain._shared.copies._threads.clear()   # kill -9
    stop = [False]
    def run(i):
        out = []
        with HybridSaver.from_conn_string(postgres_url, redis=redis_url, keyring=KEYRING, accept_plaintext=soon(), flush_after=600, epoch_ttl_s=.2) as s:
            while True:
                try:
                    d = s.threads.seal_existing(); out.append(d)
                    if d == (0,0,0): return out
                except UnavailableError as e: out.append("U"); time.sleep(.2)
    with ThreadPoolExecutor(4) as p: 
        for r in p.map(run, range(4)): print(r[:12])
    s = start(); time.sleep(2); s.flush()
    bad = {n: numbers(s, f"t{n}") for n in range(N) if numbers(s, f"t{n}") != [2,1,0]}
    print("LOST", bad)
    print([r.getMessage()[:150] for r in caplog.records][:10])
    assert not bad
