-- Take entries that Postgres has out of the journal, by their ids.
-- KEYS  meta, journal, dirty
-- ARGV  thread, super-steps among the entries, ttl, entry ids
local meta, journal, dirty = KEYS[1], KEYS[2], KEYS[3]
for at = 4, #ARGV do redis.call('XDEL', journal, ARGV[at]) end
local first = redis.call('XRANGE', journal, '-', '+', 'COUNT', 1)[1]
if first then
  redis.call('ZADD', dirty, 'XX', first[1]:match('^%d+'), ARGV[1])
else
  -- The empty stream stays a while: it remembers the last id, so none is used twice.
  redis.call('EXPIRE', journal, ARGV[3])
  local fence = redis.call('HGET', meta, 'f')
  if not (fence and starts(fence, 'closing:')) then redis.call('ZREM', dirty, ARGV[1]) end
end
if redis.call('HEXISTS', meta, 'n') == 1 then
  local steps = first and math.max(0, redis.call('HGET', meta, 'n') - ARGV[2]) or 0
  redis.call('HSET', meta, 'n', steps)
end
return {'ok'}
