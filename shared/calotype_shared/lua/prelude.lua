-- Stands before every script. KEYS[1] is the key prefix (see keys.py); EDGES comes from jobs.TRANSITIONS.
local PREFIX = KEYS[1]
local EDGES = {@EDGES@}

local function job_key(id) return PREFIX .. 'job:' .. id end

-- The server's clock in whole microseconds, so that no machine's own clock matters. Below 2^53: exact as a double.
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Numbers go to Redis through this: Lua's own tostring keeps only 14 digits.
local function whole(number) return string.format('%.0f', number) end

-- The one place that writes a state. Counts: queued and running are gauges, final states only grow.
local function move(id, to)
  local from = redis.call('HGET', job_key(id), 'state')
  if not EDGES[from .. '>' .. to] then
    error('illegal transition ' .. from .. ' to ' .. to .. ' of job ' .. id)
  end
  redis.call('HSET', job_key(id), 'state', to)
  redis.call('HINCRBY', PREFIX .. 'counts', from, -1)
  redis.call('HINCRBY', PREFIX .. 'counts', to, 1)
  return from
end

-- Puts a message for a queued job at the back of its line ('LPUSH') or, if it stood in it before, at the front ('RPUSH').
local function publish(id, queue, template, push, now)
  local message = template:gsub('@id@', id):gsub('@queue@', queue)
  redis.call('ZADD', PREFIX .. 'waiting:' .. queue, whole(now), id)
  redis.call('HSET', job_key(id), 'queued_at', whole(now))
  redis.call(push, PREFIX .. queue, message)
end

-- Back to the front of the line, with no step done: its next attempt starts anew. Claims of such a job must not move the queue's mark: it is out of turn.
local function requeue(id, template, now)
  local queue = redis.call('HGET', job_key(id), 'queue')
  redis.call('HSET', job_key(id), 'out_of_turn', '1', 'step', '0', 'total_steps', '0')
  publish(id, queue, template, 'RPUSH', now)
end

-- Enters a final state: the lease and the place in line go, the record stays for its retention.
local function finish(id, to, now, retention)
  local from = move(id, to)
  redis.call('HSET', job_key(id), 'finished_at', whole(now))
  redis.call('ZREM', PREFIX .. 'leases', id)
  redis.call('ZREM', PREFIX .. 'waiting:' .. redis.call('HGET', job_key(id), 'queue'), id)
  redis.call('PEXPIRE', job_key(id), whole(tonumber(retention) * 1000))
  return from
end

-- Whether this attempt still owns the job: running, and claimed by nobody since.
local function holds(id, attempt)
  local found = redis.call('HMGET', job_key(id), 'state', 'attempt')
  return found[1] == 'running' and found[2] == attempt
end

