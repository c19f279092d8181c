-- Read a thread's journal in order; of entries that the caller has, their uid alone.
-- KEYS  journal
-- ARGV  uids
require_type(KEYS[1], 'stream')
local known = {}
for _, uid in ipairs(ARGV) do known[uid] = true end
local entries = redis.call('XRANGE', KEYS[1], '-', '+')
for _, entry in ipairs(entries) do
  local fields = entry[2]
  for at = 1, #fields, 2 do
    if fields[at] == 'u' and known[fields[at + 1]] then
      entry[2] = {'u', fields[at + 1]}
      break
    end
  end
end
return entries
