-- How many entries wait in a thread's journal.
-- KEYS  journal
require_type(KEYS[1], 'stream')
return redis.call('XLEN', KEYS[1])
