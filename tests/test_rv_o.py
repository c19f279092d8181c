import time, threading, pytest
from langgraph_vat import *
from langgraph_vat._io.driver import drive
from langgraph_vat._ops import threads as th, tiers
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds)

def test_no_redis_failure_at_all(start, postgres_url, monkeypatch, caplog):
    """another process degraded (as two sealers at once make it); this process's flusher learns it between close and flush"""
    o = dict(flush_after=1.0, epoch_ttl_s=.3)
    plain = start(sealed=False, **o); c = grow(plain, at(), 1); plain.flush(); grow(plain, c, 3, first=1)
    plain._shared.copies._threads.clear()
    s, other = start(**o), start(**o); other.get_tuple(at())
    orig = th._close; once = []
    async def close(*a):
        r = await orig(*a)
        if not once:
            once.append(1)
            drive(tiers.degrade(other._shared, other._life.blocking()))
            drive(tiers.refresh(s._shared, s._life.blocking()))   # the background flusher does this
        return r
    monkeypatch.setattr(th, "_close", close)
    try: print(s.threads.seal_existing())
    except Exception as e: print(repr(e)[:150])
    time.sleep(3)
    for _ in range(6):
        f = start(**o)
        try:
            f.threads.seal_existing(); f.get_tuple(at()); f.flush(); drive(tiers.refresh(f._shared, f._life.blocking(), may_try=True)); f.flush()
        except UnavailableError: pass
        time.sleep(.6)
    print("RESULT", numbers(start(**o)), [r.getMessage()[:120] for r in caplog.records if r.levelname == "ERROR"])

@pytest.mark.parametrize("down", [0.5])
def test_real(own_redis, start, postgres_url, monkeypatch, caplog, down):
    o = dict(redis=own_redis.url, flush_after=1.0)
    plain = start(sealed=False, **o); c = grow(plain, at(), 1); plain.flush(); grow(plain, c, 3, first=1)
    plain._shared.copies._threads.clear()
    s = start(**o); orig = th._close; once = []
    def back(): time.sleep(down); own_redis.start()
    async def close(*a):
        r = await orig(*a)
        if not once: once.append(1); own_redis.kill(); threading.Thread(target=back).start()
        return r
    monkeypatch.setattr(th, "_close", close)
    print(s.threads.seal_existing())
    live = HybridSaver.from_conn_string(postgres_url, keyring=KEYRING, accept_plaintext=soon(), **o); live.setup(); live.get_tuple(at())
    time.sleep(12); live.get_tuple(at()); time.sleep(3)
    print("RESULT", numbers(live), [r.getMessage()[:120] for r in caplog.records if r.levelname == "ERROR"]); live.close()
