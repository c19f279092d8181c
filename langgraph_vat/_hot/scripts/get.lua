-- Read the head of a namespace: the newest checkpoint with its pending writes.
-- KEYS  meta, head, journal
-- ARGV  epoch, id ('' for the newest), run ids of the servers that are trusted
-- Another process in the place of the one that was trusted (a restart, a failover)
-- may remember less; it is asked here because the driver reconnects unseen.
local run = redis.call('INFO', 'server'):match('run_id:(%w+)')
if not ARGV[3]:find(run, 1, true) then return {'replaced'} end
require_type(KEYS[1], 'hash')
require_type(KEYS[2], 'hash')
local stop = obstacle(KEYS[1], nil, ARGV[1])
if stop then return stop end
local fence = redis.call('HGET', KEYS[1], 'f')
local state = redis.call('HMGET', KEYS[2], 'f', 'i', 'z')
if state[1] ~= mark(fence, ARGV[1], state[2], KEYS[2]) or state[3] then return {'open'} end
if ARGV[2] ~= '' and state[2] ~= ARGV[2] then
  require_type(KEYS[3], 'stream')
  return {redis.call('XLEN', KEYS[3]) > 0 and 'past' or 'clean'}
end
return {'ok', fence, redis.call('HGETALL', KEYS[2])}
