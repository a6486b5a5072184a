-- An attempt failed. ARGV: id, attempt, error, retry (1 or 0), retention in seconds, template.
-- Returns 'queued' if another attempt follows, 'failed' if not, nothing if this attempt no longer owns the job.
local id, attempt, problem, retry = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
if not holds(id, attempt) then return false end
local now, job = now_us(), job_key(id)
local failures = redis.call('HINCRBY', job, 'failures', 1)
redis.call('HSET', job, 'error', problem)
if retry and failures < tonumber(redis.call('HGET', job, 'max_failures')) then
  move(id, 'queued')
  redis.call('ZREM', PREFIX .. 'leases', id)
  requeue(id, ARGV[6], now)
  return 'queued'
end
finish(id, 'failed', now, ARGV[5])
return 'failed'
