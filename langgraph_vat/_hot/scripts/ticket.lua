-- Draw the ticket that a cache fill needs: it is void once anything changes.
-- KEYS  meta, journal
-- ARGV  ticket to use if there is none, ttl
require_type(KEYS[1], 'hash')
require_type(KEYS[2], 'stream')
local fence = redis.call('HGET', KEYS[1], 'f')
if fence and starts(fence, 'closing:') then return {'closing', fence} end
if redis.call('XLEN', KEYS[2]) > 0 then return {'dirty'} end
redis.call('HSETNX', KEYS[1], 't', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {'ok', redis.call('HGET', KEYS[1], 't')}
