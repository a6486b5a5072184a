-- A worker takes the next job by fair share, from the first of several queues that has one. ARGV: worker, lease in ms,
-- token, crashes from which on this worker leaves a job to others, how many jobs of a queue to inspect for one of a shape
-- that the worker runs, those shapes (separated by commas), queues.
-- Returns {id, its record as a flat list of fields and values}, or nothing if there is none.
local worker, lease, token, quarantine, look = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local shapes = {}
for shape in ARGV[6]:gmatch('[^,]+') do shapes[shape] = true end
local PAGE, CHUNK, MOST, REMEMBERED = 128, 16, 1024, 5000000
local now = now_us()

-- Returns the job of a queue that this worker takes, the tag of the first job that it could have taken (usually the
-- same job), and the number of inspected jobs with a newer schema. A job of a shape that the worker runs is taken before
-- jobs ahead of it, and each of those counts it. A job that was passed over `look` times is not passed over again: so no
-- job waits for more than `look` jobs from behind (decision 22).
local function choose(queue)
  local line, looked, at, newer, over, tag = PREFIX .. 'waiting:' .. queue, 0, 0, 0, {}, nil
  while looked < math.max(PAGE, look) do
    -- First only one, because usually it is taken.
    local ids = redis.call('ZRANGE', line, at, looked == 0 and at or at + CHUNK - 1)
    if #ids == 0 then break end
    for _, id in ipairs(ids) do
      local record = redis.call('HMGET', job_key(id), 'state', 'schema', 'crashes', 'shape', 'passed')
      looked, at = looked + 1, at + 1
      if record[1] ~= 'queued' then
        redis.call('ZREM', line, id)  -- its record was deleted manually
        at = at - 1
      elseif not known(record[2]) then
        newer = newer + 1
      elseif tonumber(record[3] or '0') < quarantine then
        tag = tag or redis.call('ZSCORE', line, id)
        if shapes[record[4]] then
          for _, other in ipairs(over) do redis.call('HINCRBY', job_key(other), 'passed', 1) end
          return id, tag, newer
        end
        over[#over + 1] = id
        if #over >= look or tonumber(record[5] or '0') >= look then return over[1], tag, newer end
      end
    end
  end
  return over[1], tag, newer
end

-- The first job in a range of a queue that can be taken; or the number of jobs with a newer schema.
local function first_of(queue, from, to)
  local line, newer = PREFIX .. 'waiting:' .. queue, 0
  local found = redis.call('ZRANGE', line, from, to, 'WITHSCORES')
  for i = 1, #found, 2 do
    local record = redis.call('HMGET', job_key(found[i]), 'state', 'schema', 'crashes')
    if record[1] ~= 'queued' then
      redis.call('ZREM', line, found[i])
    elseif not known(record[2]) then
      newer = newer + 1
    elseif tonumber(record[3] or '0') < quarantine then
      return found[i], found[i + 1]
    end
  end
  return nil, nil, newer
end

-- Skips quarantined jobs, and any number of jobs with a newer schema, which must not block the jobs behind them.
-- To keep each claim short, the next claim continues where this one stopped, for a few seconds only, because the queue
-- changes.
local function first(queue)
  local id, tag, newer = choose(queue)
  if id or newer == 0 then return id, tag end
  local queue_state, passed, since = PREFIX .. 'queue_state:' .. queue, 'passed:' .. SCHEMA, 'passed_at:' .. SCHEMA
  local found, from = redis.call('HMGET', queue_state, passed, since), PAGE
  local fresh = found[2] and now - tonumber(found[2]) < REMEMBERED
  if fresh then from = tonumber(found[1]) end
  local stop = from + MOST
  repeat
    id, tag, newer = first_of(queue, from, from + PAGE - 1)
    if newer == PAGE then from = from + PAGE end
  until id or newer < PAGE or from == stop
  redis.call('HSET', queue_state, passed, whole(from), since, fresh and found[2] or whole(now))
  return id, tag
end

local queue, id, tag
for i = 7, #ARGV do
  queue = ARGV[i]
  id, tag = first(queue)
  if id then break end
end
if not id then return false end
redis.call('ZREM', PREFIX .. 'waiting:' .. queue, id)
local job, queue_state = job_key(id), PREFIX .. 'queue_state:' .. queue
move(id, 'running')
redis.call('HINCRBY', job, 'attempt', 1)
redis.call('HSET', job, 'worker', worker, 'token', token, 'started_at', whole(now), 'step', '0', 'total_steps', '0')
redis.call('ZADD', PREFIX .. 'leases', whole(now / 1000 + lease), id)
-- New tenants start from this tag: idle time earns no credit. It is the tag of the first job, even if a later one is
-- taken: new jobs do not wait longer because of it, and do not get ahead of jobs that were passed over.
if tonumber(tag) > tonumber(redis.call('HGET', queue_state, 'virtual') or '0') then
  redis.call('HSET', queue_state, 'virtual', whole(tonumber(tag)))
end
return {id, redis.call('HGETALL', job)}
