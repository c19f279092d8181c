-- Open a closed thread: the next caller asks Postgres for its fence.
-- KEYS  meta, journal, dirty
-- ARGV  fence it was closed under, thread, 1 to drop the journal as well
require_type(KEYS[1], 'hash')
require_type(KEYS[2], 'stream')
require_type(KEYS[3], 'zset')
if redis.call('HGET', KEYS[1], 'f') ~= 'closing:' .. ARGV[1] then return {'refused'} end
redis.call('DEL', KEYS[1])
if ARGV[3] == '1' then redis.call('DEL', KEYS[2]) end
if redis.call('XLEN', KEYS[2]) == 0 then redis.call('ZREM', KEYS[3], ARGV[2]) end
return {'ok'}
