-- Store pending writes of a checkpoint, which may not have arrived yet.
-- KEYS  meta, head, journal, dirty
-- ARGV  thread, fence, epoch, ttl, id, 1 if big,
--       2 x journal-only fields, then those and the shared ones
local meta, head, journal, dirty = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local thread, fence, epoch, ttl, id = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local big = ARGV[6] == '1'
local shared = 8 + tonumber(ARGV[7])

require_type(meta, 'hash')
require_type(head, 'hash')
require_type(journal, 'stream')
require_type(dirty, 'zset')

local stop = obstacle(meta, fence, epoch)
if stop then return stop end

local state = redis.call('HMGET', head, 'f', 'i', 'z')
local belongs = state[1] == mark(fence, epoch, state[2], head) and not less(id, state[2])

local fields = {'k', 'writes', 'f', fence, 'i', id}
for at = 8, #ARGV do fields[#fields + 1] = ARGV[at] end
local entry = append(meta, journal, dirty, thread, ttl, fields)

if belongs and big then
  make_sparse(head)
elseif belongs and not state[3] then
  local added = 0
  for at = shared, #ARGV, 2 do
    -- w: the first write of an index stays; x: the last one of a special channel does.
    local set_one = starts(ARGV[at], 'w:') and 'HSETNX' or 'HSET'
    added = added + redis.call(set_one, head, ARGV[at], ARGV[at + 1])
  end
  count(head, added)
  redis.call('EXPIRE', head, ttl)
end
return {'ok', entry, steps_of(meta)}
