-- A draining worker returns a job, without counting a failure. ARGV: id, attempt, token.
-- Returns 1 or 0.
local id = ARGV[1]
if not holds(id, ARGV[2], ARGV[3]) then return 0 end
local now = now_us()
record_failed_attempt(id, 'released', nil, now)
move(id, 'queued')
redis.call('ZREM', PREFIX .. 'leases', id)
requeue(id, now)
return 1
