-- Precedes every script. KEYS[1] is the key prefix (see keys.py). EDGES comes from jobs.TRANSITIONS, MESSAGE from
-- message.py and SCHEMA from records.py.
local PREFIX = KEYS[1]
local SCHEMA = '@SCHEMA@'
local EDGES = {@EDGES@}
local MESSAGE = [==[@MESSAGE@]==]

local function job_key(id) return PREFIX .. 'job:' .. id end

-- The server's clock in microseconds, so that other clocks do not matter. Below 2^53: exact as a double.
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Formats numbers for Redis: Lua's tostring keeps only 14 digits.
local function whole(number) return string.format('%.0f', number) end

-- Whether a record's schema is known to this version.
local function known(schema) return (tonumber(schema) or math.huge) <= tonumber(SCHEMA) end

-- Counts queued jobs of a tenant outside batches. Batches limit themselves.
local function count_pending(tenant, more)
  redis.call('HINCRBY', PREFIX .. 'pending', tenant, more)
  redis.call('HINCRBY', PREFIX .. 'pending', '*', more)
end

-- Publishes a notice, after this script. Nothing depends on notices: they only save polling. So a user who may not publish
-- (by default one of Redis 7 may not) does not make a script fail that has already written.
local function notify(channel, text) redis.pcall('PUBLISH', PREFIX .. channel, text) end

-- Notifies clients that wait for a job. Usually there are no subscribers.
local function announce(id, state) notify('changed:' .. id, state) end

-- The only function that writes a state. Counts of queued and running are gauges, those of final states totals.
local function move(id, to)
  local found = redis.call('HMGET', job_key(id), 'state', 'batch', 'tenant')
  local from, batch = found[1], found[2]
  if not EDGES[from .. '>' .. to] then
    error('illegal transition ' .. from .. ' to ' .. to .. ' of job ' .. id)
  end
  redis.call('HSET', job_key(id), 'state', to)
  redis.call('HINCRBY', PREFIX .. 'counts', from, -1)
  redis.call('HINCRBY', PREFIX .. 'counts', to, 1)
  if batch then
    redis.call('HINCRBY', PREFIX .. 'batch:' .. batch, from, -1)
    redis.call('HINCRBY', PREFIX .. 'batch:' .. batch, to, 1)
  elseif from == 'queued' then
    count_pending(found[3], -1)
  elseif to == 'queued' then
    count_pending(found[3], 1)
  end
  announce(id, to)
  return from
end

-- Pushes wake-up messages: each means to claim the next job of the queue.
local function push_messages(queue, count)
  local last = redis.call('INCRBY', PREFIX .. 'messages', count)
  local template, messages = MESSAGE:gsub('@queue@', queue), {}
  for i = 1, count do messages[i] = template:gsub('@id@', queue .. '-' .. whole(last - count + i)) end
  redis.call('LPUSH', PREFIX .. queue, unpack(messages))
  -- Full workers receive no messages, but have reserved slots for these jobs (decision 11).
  if queue:sub(-12) == '.interactive' then notify('arrived:' .. queue, queue) end
end

-- Puts a job into its queue at the position `tag` (claim takes the lowest), and pushes a wake-up message.
local function enqueue(id, queue, tag, now)
  redis.call('ZADD', PREFIX .. 'waiting:' .. queue, tag, id)
  redis.call('HSET', job_key(id), 'queued_at', whole(now), 'tag', tag)
  push_messages(queue, 1)
end

-- Returns a job to its old queue position, which is near the front by now. The next attempt starts from step 0.
local function requeue(id, now)
  local found = redis.call('HMGET', job_key(id), 'queue', 'tag')
  redis.call('HSET', job_key(id), 'step', '0', 'total_steps', '0')
  enqueue(id, found[1], found[2], now)
end

-- Queues a webhook delivery for a job or a batch.
local function enqueue_webhook(id, url, kind, tenant, now)
  redis.call('HSET', PREFIX .. 'hook:' .. id, 'url', url, 'type', kind, 'tenant', tenant, 'at', whole(now), 'attempts', '0')
  redis.call('PEXPIRE', PREFIX .. 'hook:' .. id, '259200000')
  redis.call('ZADD', PREFIX .. 'hooks', whole(now / 1000), id)
end

-- Gives a job's outcome to its followers. After a cancellation, the first follower becomes the new leader.
local function resolve_followers(id, to, identity, now, retention, finish)
  local in_flight, waited = PREFIX .. 'in_flight:' .. identity, PREFIX .. 'followers:' .. id
  local followers = redis.call('LRANGE', waited, 0, -1)
  redis.call('DEL', waited)
  if redis.call('GET', in_flight) == id then redis.call('DEL', in_flight) end
  local shared = redis.call('HMGET', job_key(id), 'images', 'error')
  local new_leader = nil
  for _, follower in ipairs(followers) do
    if redis.call('HGET', job_key(follower), 'state') == 'queued' then
      if to == 'succeeded' then
        redis.call('HSET', job_key(follower), 'images', shared[1])
        finish(follower, to, now, retention)
      elseif to == 'failed' then
        redis.call('HSET', job_key(follower), 'error', shared[2])
        finish(follower, to, now, retention)
      elseif new_leader then
        redis.call('HSET', job_key(follower), 'leader', new_leader)
        redis.call('RPUSH', PREFIX .. 'followers:' .. new_leader, follower)
      else
        new_leader = follower
        redis.call('HDEL', job_key(new_leader), 'leader')
        redis.call('SET', in_flight, new_leader)
        requeue(new_leader, now)
      end
    end
  end
end

-- Enters a final state: removes the lease and the queue position. The record stays for its retention or, in a batch,
-- until its result is in storage.
local function finish(id, to, now, retention)
  local job = job_key(id)
  local from = move(id, to)
  local found = redis.call('HMGET', job, 'queue', 'batch', 'identity', 'webhook', 'tenant', 'leader', 'reusable')
  local queue, batch, identity, webhook, tenant, leader, reusable = unpack(found)
  redis.call('HSET', job, 'finished_at', whole(now))
  redis.call('ZREM', PREFIX .. 'leases', id)
  -- Removes one wake-up message. If a worker has received it already, it claims another job or drops it.
  if redis.call('ZREM', PREFIX .. 'waiting:' .. queue, id) == 1 then redis.call('RPOP', PREFIX .. queue) end
  if batch then
    redis.call('SREM', PREFIX .. 'live:' .. batch, id)
    redis.call('RPUSH', PREFIX .. 'done:' .. batch, id)
  else
    redis.call('PEXPIRE', job, whole(tonumber(retention) * 1000))
  end
  if webhook then enqueue_webhook(id, webhook, 'job.' .. to, tenant, now) end
  if identity and not leader then
    if reusable and to == 'succeeded' then
      redis.call('SET', PREFIX .. 'finished:' .. identity, redis.call('HGET', job, 'images'), 'PX', whole(tonumber(retention) * 1000))
    end
    resolve_followers(id, to, identity, now, retention, finish)
  elseif leader then
    redis.call('LREM', PREFIX .. 'followers:' .. leader, 1, id)
  end
  return from
end

-- Whether a claim is still the job's newest. The token is needed because Redis can lose its last writes and then issue
-- the same attempt number twice.
local function claimed(id, attempt, token)
  local found = redis.call('HMGET', job_key(id), 'attempt', 'token')
  return found[1] == attempt and found[2] == token
end

-- Whether this attempt still owns the job: it is running, and there is no newer claim.
local function holds(id, attempt, token)
  return redis.call('HGET', job_key(id), 'state') == 'running' and claimed(id, attempt, token)
end

-- Whether this attempt ended the job by its commit: the worker may not know yet, because the response was lost.
local function committed(id, attempt, token)
  return redis.call('HGET', job_key(id), 'state') == 'succeeded' and claimed(id, attempt, token)
end

-- Called when an attempt ends without a commit: records how it ended, and adds its storage folder to the orphans.
local function record_failed_attempt(id, how, problem, now)
  local job = job_key(id)
  local found = redis.call('HMGET', job, 'attempt', 'token', 'worker', 'started_at', 'history')
  local history = cjson.decode(found[5] or '[]')
  if #history >= 20 then table.remove(history, 1) end
  history[#history + 1] = {attempt = tonumber(found[1]), worker = found[3] or nil, started_at = tonumber(found[4] or now) / 1e6,
    ended_at = now / 1e6, how = how, error = problem and cjson.decode(problem) or nil}
  redis.call('HSET', job, 'history', cjson.encode(history))
  redis.call('ZADD', PREFIX .. 'orphans', whole(now / 1000), id .. '/' .. found[1] .. '-' .. (found[2] or ''))
end

-- Adds a job to the list of dead jobs. Failed lines of a batch are in the batch's errors instead.
local function mark_dead(id, now)
  if redis.call('HEXISTS', job_key(id), 'batch') == 0 or redis.call('HEXISTS', job_key(id), 'crashes') == 1 then
    redis.call('ZADD', PREFIX .. 'dead', whole(now / 1000), id)
  end
end

