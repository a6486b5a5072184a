-- Ends a job successfully if this attempt still owns it. ARGV: id, attempt, token, images, timings, retention in seconds, steps.
-- The steps are those of its images, for a job that ended before any progress was recorded.
-- Returns 1, also if this commit was made before and its response was lost; else 0.
local id = ARGV[1]
if not holds(id, ARGV[2], ARGV[3]) then
  return committed(id, ARGV[2], ARGV[3]) and 1 or 0
end
local total = redis.call('HGET', job_key(id), 'total_steps')
if total == '0' then total = ARGV[7] end
redis.call('HSET', job_key(id), 'images', ARGV[4], 'timings', ARGV[5], 'step', total, 'total_steps', total)
finish(id, 'succeeded', now_us(), ARGV[6])
return 1
