-- Which database this Redis is the hot tier of; ARGV[1] if of none so far.
-- KEYS  identity
-- ARGV  identity of the hot tier, 1 to claim a Redis that has none
if ARGV[2] == '1' then redis.call('SETNX', KEYS[1], ARGV[1]) end
return redis.call('GET', KEYS[1])
