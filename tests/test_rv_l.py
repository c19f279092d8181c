import time, threading, random, pytest
from langgraph.store.base import PutOp, GetOp, SearchOp
from langgraph_vat import *
from tests.test_plaintext import (KEYRING, MARKER, soon, store, kept, sql)

@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("mix", ["sp", "sg", "sgp", "m"])
def test_mix(store, postgres_url, seal, mix):
    plain = store(sealed=False)
    plain.batch([PutOp(("a", f"n{n%5}"), f"k{n}", {"t": MARKER}, ttl=100) for n in range(800)])
    stop, errs, done = threading.Event(), [], [0]
    ws = [store() for _ in range(4)]
    def run(i):
        d = random.Random(i); s = ws[i % 4]
        while not stop.is_set():
            try:
                x = d.choice(mix)
                if x == "s": s.search(("a",), limit=300, offset=d.randrange(300))
                elif x == "p": s.batch([PutOp(("a", f"n{n%5}"), f"k{n}", {"t": MARKER, "w": i}, ttl=100) for n in d.sample(range(800), 60)])
                elif x == "g": s.batch([GetOp(("a", f"n{n%5}"), f"k{n}") for n in d.sample(range(800), 60)])
                else: s.batch([GetOp(("a", f"n{n%5}"), f"k{n}") for n in d.sample(range(800), 20)] + [PutOp((f"r{d.randrange(4)}",), "x", {"t": MARKER}), PutOp(("a", "n1"), "k1", {"t": MARKER})])
                done[0] += 1
            except Exception as e: errs.append(repr(e)[60:100])
    ths = [threading.Thread(target=run, args=(i,)) for i in range(8)]; [t.start() for t in ths]
    time.sleep(1.5); n0 = len(errs)
    out = []
    if seal:
        for _ in range(3):
            try: out.append(store().seal_existing()); break
            except Exception as e: out.append(repr(e)[:90])
    else: time.sleep(4)
    stop.set(); [t.join() for t in ths]
    print("RES", mix, seal, "sealer:", out, "errs before", n0, "all", len(errs), done, set(errs))
