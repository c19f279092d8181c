-- Forget heads that Postgres has overtaken, and any fill under way.
-- KEYS  meta, heads
redis.call('HDEL', KEYS[1], 't')
for at = 2, #KEYS do redis.call('DEL', KEYS[at]) end
return {'ok'}
