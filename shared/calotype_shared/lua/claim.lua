-- A worker takes a queued job. ARGV: id, worker, lease in ms.
-- Returns the record as a flat list of fields and values, or nothing if the job is not there to be taken.
local id, worker, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local job = job_key(id)
if redis.call('HGET', job, 'state') ~= 'queued' then return false end
local now = now_us()
move(id, 'running')
redis.call('HINCRBY', job, 'attempt', 1)
redis.call('HSET', job, 'worker', worker, 'started_at', whole(now), 'step', '0', 'total_steps', '0')
local found = redis.call('HMGET', job, 'queue', 'queued_at', 'out_of_turn')
local queue = found[1]
redis.call('ZREM', PREFIX .. 'waiting:' .. queue, id)
redis.call('ZADD', PREFIX .. 'leases', whole(now / 1000 + lease), id)
if not found[3] then
  local mark = PREFIX .. 'mark:' .. queue
  local high = tonumber(redis.call('HGET', mark, 'high') or '0')
  if tonumber(found[2]) > high then redis.call('HSET', mark, 'high', found[2]) end
end
return redis.call('HGETALL', job)
