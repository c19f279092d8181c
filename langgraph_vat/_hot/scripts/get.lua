-- Read the head of a namespace: the newest checkpoint with its pending writes.
-- KEYS  meta, head
-- ARGV  epoch, id ('' for the newest)
local stop = obstacle(KEYS[1], nil, ARGV[1])
if stop then return stop end
local fence = redis.call('HGET', KEYS[1], 'f')
local state = redis.call('HMGET', KEYS[2], 'f', 'i', 'z')
if state[1] ~= fence or state[3] then return {'open'} end
if ARGV[2] ~= '' and state[2] ~= ARGV[2] then return {'past', fence} end
return {'ok', fence, redis.call('HGETALL', KEYS[2])}
