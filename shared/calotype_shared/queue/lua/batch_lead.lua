-- A dispatcher takes or keeps the lead of a batch. ARGV: id, dispatcher, lease in ms.
-- Returns its record as a flat list of fields and values, nothing if another leads it or it is final, or the number of
-- its schema if that is newer than this dispatcher knows.
local id, who, lease = ARGV[1], ARGV[2], ARGV[3]
local batch, lead = PREFIX .. 'batch:' .. id, PREFIX .. 'leader:' .. id
if redis.call('EXISTS', batch) == 0 then redis.call('ZREM', PREFIX .. 'open_batches', id) end
if not redis.call('ZSCORE', PREFIX .. 'open_batches', id) then return false end  -- it is final
local schema = redis.call('HGET', batch, 'schema')
if not known(schema) then return tostring(schema) end  -- this dispatcher may not be able to read its plan
local leader = redis.call('GET', lead)
if leader == who then
  redis.call('PEXPIRE', lead, lease)
elseif not leader then
  redis.call('SET', lead, who, 'PX', lease)
  redis.call('HINCRBY', batch, 'fence', 1)  -- later writes of the former leader are refused
else
  return false
end
return redis.call('HGETALL', batch)
