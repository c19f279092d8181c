-- Milliseconds on Redis's own clock, by which the age of journals is told.
-- KEYS  any
local now = redis.call('TIME')
return now[1] * 1000 + math.floor(now[2] / 1000)
