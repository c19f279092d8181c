-- Close a thread for a change of its history in Postgres: no head is served or
-- filled and no step taken until it is opened again. A closed thread has no
-- TTL, so it cannot be evicted and forgotten; and it counts as dirty, so that
-- flushers find it if whoever closed it does not come back. Its journal gets no
-- longer from here on: how long it is, is returned.
-- KEYS  meta, journal, dirty
-- ARGV  fence, thread
require_type(KEYS[1], 'hash')
require_type(KEYS[2], 'stream')
require_type(KEYS[3], 'zset')
redis.call('HSET', KEYS[1], 'f', 'closing:' .. ARGV[1])
redis.call('HDEL', KEYS[1], 't')
redis.call('PERSIST', KEYS[1])
local waiting = redis.call('XLEN', KEYS[2])
redis.call('ZADD', KEYS[3], 'NX', now_ms(), ARGV[2])
return {'ok', waiting}
