-- How many entries wait in a thread's journal.
-- KEYS  journal
return redis.call('XLEN', KEYS[1])
