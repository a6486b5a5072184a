-- Records a failed attempt. ARGV: id, attempt, token, error, retry (1 or 0), retention in seconds.
-- Returns 'queued' if another attempt follows, 'failed' if not, nothing if this attempt no longer owns the job.
local id, problem, retry = ARGV[1], ARGV[4], ARGV[5] == '1'
if not holds(id, ARGV[2], ARGV[3]) then return false end
local now, job = now_us(), job_key(id)
record_failed_attempt(id, 'failed', problem, now)
local failures = redis.call('HINCRBY', job, 'failures', 1)
redis.call('HSET', job, 'error', problem)
if retry and failures < tonumber(redis.call('HGET', job, 'max_failures')) then
  move(id, 'queued')
  redis.call('ZREM', PREFIX .. 'leases', id)
  requeue(id, now)
  return 'queued'
end
mark_dead(id, now)
finish(id, 'failed', now, ARGV[6])
return 'failed'
