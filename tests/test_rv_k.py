import time, threading, random, pytest
from langgraph.store.base import PutOp, GetOp, SearchOp
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, store, kept, sql)

@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("what", ["search", "getbatch", "putbatch", "delbatch"])
def test_deadlocks(store, postgres_url, seal, what):
    plain = store(sealed=False)
    plain.batch([PutOp(("a", f"n{n%5}"), f"k{n}", {"t": MARKER}, ttl=100) for n in range(2500)])
    stop, errs, done = threading.Event(), [], [0]
    ws = [store() for _ in range(4)]
    def run(i):
        d = random.Random(i); s = ws[i % 4]
        while not stop.is_set():
            try:
                if what == "search": s.search(("a",), limit=200, offset=d.randrange(2000))
                elif what == "putbatch": s.batch([PutOp(("a", f"n{n%5}"), f"k{n}", {"t": MARKER, "w": i}, ttl=100) for n in d.sample(range(2500), 60)])
                elif what == "getbatch": s.batch([GetOp(("a", f"n{n%5}"), f"k{n}") for n in d.sample(range(2500), 60)])
                elif what == "delbatch": s.batch([PutOp(("a", f"n{n%5}"), f"k{n}", None) for n in d.sample(range(2500), 20)])
                done[0] += 1
            except Exception as e: errs.append(repr(e)[:100])
    n = 4 if what != "search" else 2
    ths = [threading.Thread(target=run, args=(i,)) for i in range(n)]; [t.start() for t in ths]
    time.sleep(1); n0 = len(errs)
    out = []
    if seal:
        for _ in range(4):
            try: out.append(store().seal_existing()); break
            except Exception as e: out.append(repr(e)[:90])
    else: time.sleep(3)
    stop.set(); [t.join() for t in ths]
    print("RES", what, seal, "sealer:", out, "errs before", n0, "all", len(errs), done, set(errs))
