-- Take entries that Postgres has out of the journal, by their ids.
-- KEYS  meta, journal, dirty
-- ARGV  thread, ttl, super-steps among the entries, their ids, ids of the others
local meta, journal, dirty = KEYS[1], KEYS[2], KEYS[3]
require_type(meta, 'hash')
require_type(journal, 'stream')
require_type(dirty, 'zset')
local steps = 0  -- only what was still there: two flushes may bring the same entries
for at = 4, #ARGV do
  local found = redis.call('XDEL', journal, ARGV[at])
  if at < 4 + tonumber(ARGV[3]) then steps = steps + found end
end
local first = redis.call('XRANGE', journal, '-', '+', 'COUNT', 1)[1]
if first then
  redis.call('ZADD', dirty, 'XX', first[1]:match('^%d+'), ARGV[1])
else
  -- The empty stream stays a while: it remembers the last id, so none is used twice.
  redis.call('EXPIRE', journal, ARGV[2])
  local fence = redis.call('HGET', meta, 'f')
  if not (fence and starts(fence, 'closing:')) then redis.call('ZREM', dirty, ARGV[1]) end
end
if redis.call('HEXISTS', meta, 'n') == 1 then
  local left = first and math.max(0, steps_of(meta) - steps) or 0
  redis.call('HSET', meta, 'n', left)
end
return {'ok'}
