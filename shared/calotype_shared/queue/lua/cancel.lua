-- Cancels a job immediately unless it is final. ARGV: id, retention in seconds.
-- Returns its state afterwards, or nothing if it does not exist.
local id = ARGV[1]
local state = redis.call('HGET', job_key(id), 'state')
if not state then return false end
if state ~= 'queued' and state ~= 'running' then return state end
local now = now_us()
if state == 'running' then record_failed_attempt(id, 'cancelled', nil, now) end
finish(id, 'cancelled', now, ARGV[2])
if state == 'running' then notify('cancelled', id) end
return 'cancelled'
