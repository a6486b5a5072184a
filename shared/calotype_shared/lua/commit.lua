-- Success, if this attempt still owns the job. ARGV: id, attempt, images, timings, retention in seconds. Returns 1 or 0.
local id = ARGV[1]
if not holds(id, ARGV[2]) then return 0 end
local total = redis.call('HGET', job_key(id), 'total_steps')
redis.call('HSET', job_key(id), 'images', ARGV[3], 'timings', ARGV[4], 'step', total)
finish(id, 'succeeded', now_us(), ARGV[5])
return 1
