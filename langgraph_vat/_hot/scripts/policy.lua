-- Which keys this Redis may evict when its memory is full.
-- KEYS  any
return redis.call('INFO', 'memory'):match('maxmemory_policy:(%S+)')
