-- Takes jobs back from workers that are gone, and publishes messages again that were lost on the way.
-- ARGV: who, lock in ms, gap in ms, retention in seconds, template, error for jobs out of attempts, most per list.
-- Returns nothing while another worker reaps; else {requeued ids, failed ids, republished ids}.
local who, lock, gap = ARGV[1], ARGV[2], tonumber(ARGV[3]) * 1000
local retention, template, problem, most = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
if not redis.call('SET', PREFIX .. 'reaper', who, 'NX', 'PX', lock) then return false end
local now = now_us()
local requeued, failed, republished = {}, {}, {}

-- 1. Expired leases.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'leases', '-inf', whole(now / 1000), 'LIMIT', 0, most)) do
  local job = job_key(id)
  if redis.call('HGET', job, 'state') ~= 'running' then
    redis.call('ZREM', PREFIX .. 'leases', id)
  else
    local failures = redis.call('HINCRBY', job, 'failures', 1)
    if failures >= tonumber(redis.call('HGET', job, 'max_failures')) then
      redis.call('HSET', job, 'error', problem)
      finish(id, 'failed', now, retention)
      failed[#failed + 1] = id
    else
      move(id, 'queued')
      redis.call('ZREM', PREFIX .. 'leases', id)
      requeue(id, template, now)
      requeued[#requeued + 1] = id
    end
  end
end

-- 2. Messages lost between the list and a worker. A queue is served in order, so a job that still waits although a
-- later one was claimed a while ago has no message any more; nor has one that waits long beside an empty list.
for _, queue in ipairs(redis.call('SMEMBERS', PREFIX .. 'queues')) do
  local waiting, mark = PREFIX .. 'waiting:' .. queue, PREFIX .. 'mark:' .. queue
  local found = redis.call('HMGET', mark, 'high', 'seen', 'at')
  local due = not found[3] or now - tonumber(found[3]) >= gap
  local before = nil
  if redis.call('LLEN', PREFIX .. queue) == 0 then before = now - gap end
  if due and found[2] and tonumber(found[2]) > (before or 0) then before = tonumber(found[2]) end
  if before then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', waiting, '-inf', '(' .. whole(before), 'LIMIT', 0, most)) do
      requeue(id, template, now)
      republished[#republished + 1] = id
    end
  end
  if due then redis.call('HSET', mark, 'seen', found[1] or '0', 'at', whole(now)) end
end

-- 3. The list of recent jobs forgets those whose records have expired.
local old = redis.call('ZRANGEBYSCORE', PREFIX .. 'recent', '-inf', whole(now - tonumber(retention) * 1000000), 'LIMIT', 0, most)
for _, id in ipairs(old) do
  if redis.call('EXISTS', job_key(id)) == 0 then redis.call('ZREM', PREFIX .. 'recent', id) end
end
return {requeued, failed, republished}
