-- Cancels a job immediately unless it is final. ARGV: id, retention in seconds.
-- Returns its state afterwards, or nothing if it does not exist.
local id = ARGV[1]
local state = redis.call('HGET', job_key(id), 'state')
if not state then return false end
if state ~= 'queued' and state ~= 'running' then return state end
local now = now_us()
if state == 'running' then record_failed_attempt(id, 'cancelled', nil, now) end
-- Work that did not begin is not charged to its tenant.
local found = redis.call('HMGET', job_key(id), 'queue', 'tenant', 'cost', 'attempt')
if found[3] and not found[4] and redis.call('ZSCORE', PREFIX .. 'waiting:' .. found[1], id) then
  local tags = PREFIX .. 'tenant_tags:' .. found[1]
  redis.call('HSET', tags, found[2], whole(math.max(0, tonumber(redis.call('HGET', tags, found[2]) or '0') - tonumber(found[3]))))
end
finish(id, 'cancelled', now, ARGV[2])
if state == 'running' then notify('cancelled', id) end
return 'cancelled'
