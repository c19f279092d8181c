-- Put what Postgres said into the head, unless anything changed since the ticket was drawn.
-- KEYS  meta, head, journal
-- ARGV  ticket, fence, epoch, ttl, head fields (first i, id)
local meta, head = KEYS[1], KEYS[2]
require_type(meta, 'hash')
require_type(KEYS[3], 'stream')
local state = redis.call('HMGET', meta, 't', 'f')
if state[1] ~= ARGV[1] then return {'refused'} end
if state[2] and starts(state[2], 'closing:') then return {'closing', state[2]} end
if redis.call('XLEN', KEYS[3]) > 0 then return {'refused'} end
redis.call('HSET', meta, 'f', ARGV[2], 'e', ARGV[3], 'n', 0)
redis.call('EXPIRE', meta, ARGV[4])
redis.call('DEL', head)
local values = {'f', mark(ARGV[2], ARGV[3], ARGV[6], head)}
for at = 5, #ARGV do values[at - 2] = ARGV[at] end
count(head, set(head, values))
redis.call('EXPIRE', head, ARGV[4])
return {'ok'}
