-- Shared by every script that looks at a thread's meta hash:
--   f  fence: generation and history number of the thread, or "closing:<fence>"
--   e  epoch under which it was last opened
--   n  super-steps in the journal
--   t  fill ticket: there while nothing has changed since it was drawn

-- Byte order, which is the order of Python and of Postgres's "C" collation.
-- Lua's own < follows the server's locale.
local function less(a, b)
  for at = 1, math.min(#a, #b) do
    local x, y = a:byte(at), b:byte(at)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local function starts(text, prefix)
  return text:sub(1, #prefix) == prefix
end

-- HSET of any number of fields: unpack takes no more than some thousands.
-- Returns how many are new.
local function set(key, values)
  local added = 0
  for from = 1, #values, 1000 do
    added = added + redis.call('HSET', key, unpack(values, from, math.min(from + 999, #values)))
  end
  return added
end

-- Notes that a head has so many fields more. It is counted, not looked up:
-- a field that went another way shall be missed.
local function count(head, added)
  redis.call('HSET', head, 'h', (tonumber(redis.call('HGET', head, 'h')) or 0) + added)
end

-- Leaves of a head what later puts must agree with: it is written, and not read.
local function make_sparse(head)
  for _, field in ipairs(redis.call('HKEYS', head)) do
    if not (field:match('^[fipl]$') or starts(field, 'n:')) then
      redis.call('HDEL', head, field)
    end
  end
  redis.call('HSET', head, 'z', 1)
end

-- What a head must carry in its field f to count: the thread may have been
-- opened again, for another namespace, in an epoch that this head did not see;
-- it may be another's; its id may be damaged.
local function mark(fence, epoch, id, head)
  return table.concat({fence, epoch, id or '', head}, '@')
end

-- Whether a head has as many fields as it counted.
local function is_whole(head, counted)
  return tonumber(counted or '') == redis.call('HLEN', head) - 1
end

-- Super-steps in a journal; what is no such number has them flushed at once.
local function steps_of(meta)
  local text = redis.call('HGET', meta, 'n') or '0'
  return text:match('^%d+$') and #text < 9 and tonumber(text) or 2 ^ 31
end

-- Takes away what is no such thing: somebody else wrote it, and ours is gone.
local function require_type(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
end

-- Why a thread cannot be used under this fence and epoch; nil when it can.
local function obstacle(meta, fence, epoch)
  local state = redis.call('HMGET', meta, 'f', 'e')
  local current = state[1]
  if not current then return {'open'} end
  if starts(current, 'closing:') then return {'closing', current} end
  if state[2] ~= epoch then return {'open'} end
  if fence and current ~= fence then return {'stale', current} end
  return nil
end

local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Appends one entry and marks the thread dirty; returns the entry's id.
-- The append comes first: where it fails, nothing has been written.
local function append(meta, journal, dirty, thread, ttl, fields)
  local id = redis.call('XADD', journal, '*', unpack(fields))
  redis.call('PERSIST', journal)
  redis.call('ZADD', dirty, 'NX', now_ms(), thread)
  redis.call('HDEL', meta, 't')
  redis.call('EXPIRE', meta, ttl)
  return id
end
