-- Accepts jobs of one queue: writes each record and pushes its message, all or none.
-- ARGV: queue, lane, max_failures, metadata, template, then (id, config, digest) of each job. Returns their number.
local now = now_us()
local queue, lane, max_failures, metadata, template = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local made = 0
for i = 6, #ARGV, 3 do
  local id = ARGV[i]
  redis.call('HSET', job_key(id), 'schema', '1', 'state', 'queued', 'lane', lane, 'queue', queue,
    'config', ARGV[i + 1], 'digest', ARGV[i + 2], 'max_failures', max_failures, 'metadata', metadata,
    'created_at', whole(now))
  redis.call('ZADD', PREFIX .. 'recent', whole(now), id)
  publish(id, queue, template, 'LPUSH', now)
  now = now + 1  -- so that each has its own place in the line
  made = made + 1
end
redis.call('SADD', PREFIX .. 'queues', queue)
redis.call('HINCRBY', PREFIX .. 'counts', 'queued', made)
return made
