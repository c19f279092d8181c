-- Read a thread's journal in order.
-- KEYS  journal
return redis.call('XRANGE', KEYS[1], '-', '+')
