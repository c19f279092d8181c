-- Store a checkpoint: journal and head change together.
-- KEYS  meta, head, journal, dirty
-- ARGV  thread, fence, epoch, mode, ttl, id, parent, core, 1 if big,
--       1 to refuse a fork, 2 x needs, 2 x marks, 2 x journal-only fields, then those and the shared
--       fields;
--       of a big entry the journal-only fields hold all, the shared ones the versions
-- mode  delta: only the changed channels; whole: all of them; headless: journal only
local meta, head, journal, dirty = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local thread, fence, epoch, mode, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local id, parent, core, big = ARGV[6], ARGV[7], ARGV[8], ARGV[9] == '1'
local needs = 14
local marks = needs + tonumber(ARGV[11])
local own = marks + tonumber(ARGV[12])
local shared = own + tonumber(ARGV[13])

require_type(meta, 'hash')
require_type(head, 'hash')
require_type(journal, 'stream')
require_type(dirty, 'zset')

local stop = obstacle(meta, fence, epoch)
if stop and not (mode == 'headless' and stop[1] == 'open') then return stop end

local newest, sparse
if mode ~= 'headless' then
  local state = redis.call('HMGET', head, 'f', 'i', 'l', 'z', 'h')
  local current = state[2]
  if state[1] ~= mark(fence, epoch, current, head) then return {'open'} end
  if not (state[4] or is_whole(head, state[5])) then return {'open'} end
  newest = not less(id, current)
  -- The same step may come again.
  if ARGV[10] == '1' and current ~= '' and current ~= parent and current ~= id then
    return {'conflict'}
  end
  sparse = big or state[4]
  if mode == 'delta' then
    if current ~= parent or state[3] then return {'whole'} end
    for at = needs, own - 1, 2 do
      if redis.call('HGET', head, ARGV[at]) ~= ARGV[at + 1] then
        return {at < marks and 'whole' or 'base'}
      end
    end
  end
end

local fields = {'k', 'put', 'f', fence, 'i', id, 'p', parent, 'c', core}
for at = own, big and shared - 1 or #ARGV do fields[#fields + 1] = ARGV[at] end
local entry = append(meta, journal, dirty, thread, ttl, fields)

if mode == 'headless' then
  redis.call('DEL', head)
elseif newest then
  local added = 0
  -- Writes that came before their checkpoint stay, this one's and later ones'.
  for _, field in ipairs(redis.call('HKEYS', head)) do
    local length = field:match('^[wx]:(%d+):')
    local stays = mode == 'delta' or field == 'h'
    if length then
      local from = #length + 4
      stays = not less(field:sub(from, from + length - 1), id)
    end
    if not stays then added = added - redis.call('HDEL', head, field) end
  end
  local values = {'f', mark(fence, epoch, id, head), 'i', id, 'p', parent}
  if not sparse then values[7], values[8] = 'c', core end
  for at = shared, #ARGV, 2 do
    if not sparse or starts(ARGV[at], 'n:') then
      values[#values + 1], values[#values + 2] = ARGV[at], ARGV[at + 1]
    end
  end
  count(head, added + set(head, values))
  if sparse then make_sparse(head) end
  redis.call('EXPIRE', head, ttl)
elseif not sparse then
  -- A version may come again with another value: nothing more builds on the one here.
  local added = 0
  for at = shared, #ARGV, 2 do
    if starts(ARGV[at], 'b:') then
      added = added - redis.call('HDEL', head, 'm:' .. ARGV[at]:sub(3))
    end
  end
  count(head, added)
end
local steps = steps_of(meta) + 1
redis.call('HSET', meta, 'n', steps)
-- Last, whether the head has the values now.
return {'ok', entry, steps, newest and not sparse and 1 or 0}
