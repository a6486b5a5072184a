-- A worker that is leaving hands a job back, which counts as no failure. ARGV: id, attempt, template. Returns 1 or 0.
local id = ARGV[1]
if not holds(id, ARGV[2]) then return 0 end
move(id, 'queued')
redis.call('ZREM', PREFIX .. 'leases', id)
requeue(id, ARGV[3], now_us())
return 1
