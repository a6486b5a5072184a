-- Stands before every script. KEYS[1] is the key prefix (see keys.py); EDGES comes from jobs.TRANSITIONS, MESSAGE from
-- broker.py and SCHEMA from records.py.
local PREFIX = KEYS[1]
local SCHEMA = '@SCHEMA@'
local EDGES = {@EDGES@}
local MESSAGE = [==[@MESSAGE@]==]

local function job_key(id) return PREFIX .. 'job:' .. id end

-- The server's clock in whole microseconds, so that no machine's own clock matters. Below 2^53: exact as a double.
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Numbers go to Redis through this: Lua's own tostring keeps only 14 digits.
local function whole(number) return string.format('%.0f', number) end

-- Whether a record is of no newer schema than those that wrote this script know.
local function known(schema) return (tonumber(schema) or math.huge) <= tonumber(SCHEMA) end

-- So many more jobs of a tenant wait outside batches, which bound themselves.
local function count_pending(tenant, more)
  redis.call('HINCRBY', PREFIX .. 'pending', tenant, more)
  redis.call('HINCRBY', PREFIX .. 'pending', '*', more)
end

-- Tells who waits for a job that its record has changed, once this script is done. To nobody, mostly.
local function announce(id, state) redis.call('PUBLISH', PREFIX .. 'changed:' .. id, state) end

-- The one place that writes a state. Counts: queued and running are gauges, final states only grow.
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

-- Messages: each is an invitation to claim whichever job of the queue is next.
local function push_messages(queue, count)
  local last = redis.call('INCRBY', PREFIX .. 'messages', count)
  local template, messages = MESSAGE:gsub('@queue@', queue), {}
  for i = 1, count do messages[i] = template:gsub('@id@', queue .. '-' .. whole(last - count + i)) end
  redis.call('LPUSH', PREFIX .. queue, unpack(messages))
  -- Full workers take no messages, but have room for these (decision 11).
  if queue:sub(-12) == '.interactive' then redis.call('PUBLISH', PREFIX .. 'arrived:' .. queue, queue) end
end

-- Puts a queued job in its queue's line at `tag`, its place by fair share (claim takes the lowest), and invites.
local function enqueue(id, queue, tag, now)
  redis.call('ZADD', PREFIX .. 'waiting:' .. queue, tag, id)
  redis.call('HSET', job_key(id), 'queued_at', whole(now), 'tag', tag)
  push_messages(queue, 1)
end

-- Back to the place in line it had, which by now is at the front, with no step done: its next attempt starts anew.
local function requeue(id, now)
  local found = redis.call('HMGET', job_key(id), 'queue', 'tag')
  redis.call('HSET', job_key(id), 'step', '0', 'total_steps', '0')
  enqueue(id, found[1], found[2], now)
end

-- Leaves a webhook to be delivered about a job or a batch.
local function enqueue_webhook(id, url, kind, tenant, now)
  redis.call('HSET', PREFIX .. 'hook:' .. id, 'url', url, 'type', kind, 'tenant', tenant, 'at', whole(now), 'attempts', '0')
  redis.call('PEXPIRE', PREFIX .. 'hook:' .. id, '259200000')
  redis.call('ZADD', PREFIX .. 'hooks', whole(now / 1000), id)
end

-- Equal jobs that waited for this one share its outcome; after a cancellation the first of them takes its place.
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

-- Enters a final state: the lease and the place in line go; the record stays for its retention or, in a batch, until
-- its result is written down.
local function finish(id, to, now, retention)
  local job = job_key(id)
  local from = move(id, to)
  local found = redis.call('HMGET', job, 'queue', 'batch', 'identity', 'webhook', 'tenant', 'leader', 'reusable')
  local queue, batch, identity, webhook, tenant, leader, reusable = unpack(found)
  redis.call('HSET', job, 'finished_at', whole(now))
  redis.call('ZREM', PREFIX .. 'leases', id)
  -- A place given up takes its invitation along; one that is already with a worker finds somebody else or nobody.
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

-- Whether a claim is still the job's newest. The token tells it from one of the same number: where Redis has lost its
-- last writes, an attempt may be counted twice.
local function claimed(id, attempt, token)
  local found = redis.call('HMGET', job_key(id), 'attempt', 'token')
  return found[1] == attempt and found[2] == token
end

-- Whether this attempt still owns the job: running, and claimed by nobody since.
local function holds(id, attempt, token)
  return redis.call('HGET', job_key(id), 'state') == 'running' and claimed(id, attempt, token)
end

-- Called before a running job moves on without a commit: notes how its attempt ended, for those who look into it, and
-- that what it has put into storage is nobody's.
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

-- A job has failed for good: it stays to be looked at. Bad lines of a batch are in the batch's own list.
local function mark_dead(id, now)
  if redis.call('HEXISTS', job_key(id), 'batch') == 0 or redis.call('HEXISTS', job_key(id), 'crashes') == 1 then
    redis.call('ZADD', PREFIX .. 'dead', whole(now / 1000), id)
  end
end

