-- Dirty threads of one bucket, oldest first.
-- KEYS  dirty
-- ARGV  least age in milliseconds, most threads
local now = redis.call('TIME')
local latest = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', latest, 'LIMIT', 0, ARGV[2])
