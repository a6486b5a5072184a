-- Results of the oldest final jobs are in storage: deletes the jobs' records, except those of dead jobs.
-- ARGV: id, fence, retention in seconds, number of parts, their keys, then the jobs' ids.
-- Returns 1, also if this call was made before and its response was lost; 0 if the fence has changed.
local id, fence, retention, parts = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local batch, now = PREFIX .. 'batch:' .. id, now_us()
if redis.call('HGET', batch, 'fence') ~= fence then return 0 end
if redis.call('LINDEX', PREFIX .. 'done:' .. id, 0) ~= ARGV[5 + parts] then return 1 end
for i = 5, 4 + parts do redis.call('RPUSH', PREFIX .. 'parts:' .. id, ARGV[i]) end
for i = 5 + parts, #ARGV do
  if redis.call('ZSCORE', PREFIX .. 'dead', ARGV[i]) then
    redis.call('HSET', job_key(ARGV[i]), 'harvested', '1')
    redis.call('PEXPIRE', job_key(ARGV[i]), whole(tonumber(retention) * 1000))
  else
    redis.call('DEL', job_key(ARGV[i]))
  end
end
redis.call('LTRIM', PREFIX .. 'done:' .. id, #ARGV - 4 - parts, -1)
-- Two measurements at least ten seconds apart, to compute a rate.
local found = redis.call('HMGET', batch, 'succeeded', 'failed', 'cancelled', 'mark_at', 'mark_done')
local done = tonumber(found[1] or '0') + tonumber(found[2] or '0') + tonumber(found[3] or '0')
if not found[4] or now - tonumber(found[4]) >= 10000000 then
  redis.call('HSET', batch, 'before_at', found[4] or redis.call('HGET', batch, 'in_progress_at') or whole(now),
    'before_done', found[5] or '0', 'mark_at', whole(now), 'mark_done', whole(done))
end
return 1
