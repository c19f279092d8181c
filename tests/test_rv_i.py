import time, threading, pytest
from langgraph_vat import *
from langgraph_vat._ops import threads as th
from tests.test_plaintext import (KEYRING, MARKER, soon, start, at, put, grow, states, numbers, sql, types, is_sealed, rows_with, redis_holds)

@pytest.mark.parametrize("down", [0.3, 0.8, 1.6])
def test_redis_down_for_a_moment(own_redis, start, postgres_url, monkeypatch, down):
    """real: Redis is killed right after the thread was closed in it, and is back (same data) `down` s later; the writer was killed before"""
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
    try: print(s.threads.seal_existing())
    except Exception as e: print(repr(e)[:150])
    time.sleep(7); f = start(**o); f.flush()
    for _ in range(8):
        try: print(start(**o).threads.seal_existing()); break
        except UnavailableError: time.sleep(2)
    print("RESULT", down, numbers(f), is_sealed(postgres_url))
