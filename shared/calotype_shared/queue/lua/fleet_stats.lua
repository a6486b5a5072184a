-- Counts queued and running jobs; changes nothing. ARGV: jobs at the front of a queue whose waiting time is read, leases
-- read. Both bound the run time. If there are more leases, a random sample is extrapolated.
-- Returns {(queue, waiting, running, longest wait in microseconds) of each queue, counts by state as a flat list, dead
-- jobs, open batches, waiting webhooks}.
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
