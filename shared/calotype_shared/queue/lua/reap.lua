-- Takes jobs back from dead workers, and replaces lost wake-up messages.
-- ARGV: worker, lock in ms, gap in ms, retention in seconds, error for jobs out of attempts, maximum jobs of a kind,
-- crashes after which a job fails, and in ms: a silence of all reapers, and the extension of leases after it.
-- Returns nothing while another worker reaps; else {requeued ids, failed ids, number of replaced messages}.
local who, lock, gap = ARGV[1], ARGV[2], tonumber(ARGV[3]) * 1000
local retention, problem, most = ARGV[4], ARGV[5], tonumber(ARGV[6])
if not redis.call('SET', PREFIX .. 'reaper', who, 'NX', 'PX', lock) then return false end
local most_crashes, silence, grace = tonumber(ARGV[7]), tonumber(ARGV[8]) * 1000, tonumber(ARGV[9])
local now = now_us()
local requeued, failed, invited = {}, {}, 0

-- 1. Expired leases. If no reaper ran for long, Redis was unavailable, and the leases are extended once.
local last = tonumber(redis.call('GET', PREFIX .. 'reaped_at') or whole(now))
redis.call('SET', PREFIX .. 'reaped_at', whole(now))
for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'leases', '-inf', whole(now / 1000), 'LIMIT', 0, most)) do
  local job = job_key(id)
  if now - last > silence then
    redis.call('ZADD', PREFIX .. 'leases', whole(now / 1000 + grace), id)
  elseif redis.call('HGET', job, 'state') ~= 'running' then
    redis.call('ZREM', PREFIX .. 'leases', id)
  else
    record_failed_attempt(id, 'lost', nil, now)
    if redis.call('HINCRBY', job, 'crashes', 1) >= most_crashes then
      redis.call('HSET', job, 'error', problem)
      mark_dead(id, now)
      finish(id, 'failed', now, retention)
      failed[#failed + 1] = id
    else
      move(id, 'queued')
      redis.call('ZREM', PREFIX .. 'leases', id)
      requeue(id, now)
      requeued[#requeued + 1] = id
    end
  end
end

-- 2. Lost messages. There should be one per waiting job. A message that a worker has received without a claim yet is
-- missing only for a moment, so messages that are missing in two checks are lost.
for _, queue in ipairs(redis.call('SMEMBERS', PREFIX .. 'queues')) do
  local queue_state = PREFIX .. 'queue_state:' .. queue
  local found = redis.call('HMGET', queue_state, 'lacking', 'looked_at')
  if not found[2] or now - tonumber(found[2]) >= gap then
    local lacking = redis.call('ZCARD', PREFIX .. 'waiting:' .. queue) - redis.call('LLEN', PREFIX .. queue)
    local lost = math.min(lacking, tonumber(found[1] or '0'), most)
    if lost > 0 then push_messages(queue, lost) end
    invited = invited + math.max(0, lost)
    redis.call('HSET', queue_state, 'lacking', whole(lacking - math.max(0, lost)), 'looked_at', whole(now))
  end
end

-- 3. Jobs with expired records are removed from the lists of recent and dead jobs.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'dead', '-inf', whole(now / 1000 - tonumber(retention) * 1000), 'LIMIT', 0, most)) do
  if redis.call('EXISTS', job_key(id)) == 0 then redis.call('ZREM', PREFIX .. 'dead', id) end
end
for _, tenant in ipairs(redis.call('SMEMBERS', PREFIX .. 'tenants')) do
  local recent = PREFIX .. 'recent:' .. tenant
  local before = whole(now - tonumber(retention) * 1000000)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', recent, '-inf', before, 'LIMIT', 0, most)) do
    if redis.call('EXISTS', job_key(id)) == 0 then redis.call('ZREM', recent, id) end
  end
end

-- 4. The rate of finished jobs, for retry delays.
local measured, ended = redis.call('HMGET', PREFIX .. 'completion_rate', 'at', 'ended'), 0
for _, count in ipairs(redis.call('HMGET', PREFIX .. 'counts', 'succeeded', 'failed', 'cancelled')) do
  ended = ended + tonumber(count or '0')
end
local passed = now - tonumber(measured[1] or '0')
if passed >= 15000000 then
  local rate = measured[1] and string.format('%.4f', math.max(0, ended - tonumber(measured[2])) * 1e6 / passed) or ''
  redis.call('HSET', PREFIX .. 'completion_rate', 'at', whole(now), 'ended', whole(ended), 'per_second', rate)
end
return {requeued, failed, invited}
