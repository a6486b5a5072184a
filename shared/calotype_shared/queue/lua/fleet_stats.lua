-- What is queued and running, for those who watch; changes nothing. ARGV: jobs at the front of a line whose wait is
-- looked at, leases looked at: so it takes no longer however much there is. Of more leases than that, a random choice
-- stands for all.
-- Returns {(queue, waiting, running, longest wait in microseconds) of each queue, counts by state as a flat list, dead
-- jobs, open batches, webhooks that wait}.
local now, running, queues = now_us(), {}, {}
local leases = redis.call('ZRANDMEMBER', PREFIX .. 'leases', tonumber(ARGV[2]))
local each = redis.call('ZCARD', PREFIX .. 'leases') / math.max(1, #leases)
for _, id in ipairs(leases) do
  local queue = redis.call('HGET', job_key(id), 'queue')
  if queue then running[queue] = (running[queue] or 0) + 1 end
end
for _, queue in ipairs(redis.call('SMEMBERS', PREFIX .. 'queues')) do
  local line, longest = PREFIX .. 'waiting:' .. queue, 0
  for _, id in ipairs(redis.call('ZRANGE', line, 0, tonumber(ARGV[1]) - 1)) do
    longest = math.max(longest, now - tonumber(redis.call('HGET', job_key(id), 'queued_at') or whole(now)))
  end
  queues[#queues + 1] = {queue, redis.call('ZCARD', line), math.floor((running[queue] or 0) * each + 0.5), whole(longest)}
end
return {queues, redis.call('HGETALL', PREFIX .. 'counts'), redis.call('ZCARD', PREFIX .. 'dead'),
  redis.call('ZCARD', PREFIX .. 'open_batches'), redis.call('ZCARD', PREFIX .. 'hooks')}
