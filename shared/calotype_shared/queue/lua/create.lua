-- Accepts jobs: writes each record and queues it, all or none.
-- ARGV: common fields, as JSON; then (id, queue, config, digest, cost, identity or '', custom_id or '') of each job.
-- Returns {'made'}; {'existing', id, request} if the idempotency key was used before; {'refused'} for a batch whose
-- dispatcher was replaced, whose cursor has moved or which is not running; or {'full', 'tenant' or 'all', queued jobs,
-- limit, jobs finished per second}.
local common = cjson.decode(ARGV[1])
local tenant, batch, retention = common.tenant, common.batch, common.retention
local now = now_us()

if common.idempotency_key then
  local key = PREFIX .. 'idempotency:' .. tenant .. ':' .. common.idempotency_key
  local found = redis.call('HMGET', key, 'id', 'request')
  if found[1] then return {'existing', found[1], found[2]} end
end
if batch then
  local key = PREFIX .. 'batch:' .. batch
  local found = redis.call('HMGET', key, 'state', 'fence', 'cursor', 'paused')
  if found[1] ~= 'in_progress' or found[2] ~= common.fence or found[3] ~= common.from or found[4] then
    return {'refused'}
  end
  redis.call('HSET', key, 'cursor', common.to)
end

if redis.call('EXISTS', job_key(ARGV[2])) == 1 then return {'made'} end  -- accepted before; its response was lost

local made = (#ARGV - 1) / 7
if not batch then
  local function refused(whose, field, most)
    local pending = tonumber(redis.call('HGET', PREFIX .. 'pending', field) or '0')
    if most and pending + math.max(made, common.to_come or 0) > most then
      return {'full', whose, whole(pending), whole(most), redis.call('HGET', PREFIX .. 'completion_rate', 'per_second') or ''}
    end
  end
  local full = refused('tenant', tenant, common.max_queued_per_tenant) or refused('all', '*', common.max_queued)
  if full then return full end
  count_pending(tenant, made)
end
if common.idempotency_key then
  local key = PREFIX .. 'idempotency:' .. tenant .. ':' .. common.idempotency_key
  redis.call('HSET', key, 'id', ARGV[2], 'request', common.request)
  redis.call('PEXPIRE', key, whole(tonumber(retention) * 1000))
end

local tags = {}  -- the tenant's newest queue position: a tenant that used less goes first
local lines = {}  -- by queue: positions and ids, as arguments of ZADD
local recent, live, reused = {}, {}, {}
for i = 2, #ARGV, 7 do
  local id, queue, config, digest, cost, identity, custom_id = unpack(ARGV, i, i + 6)
  if not tags[queue] then
    local virtual = redis.call('HGET', PREFIX .. 'queue_state:' .. queue, 'virtual') or '0'
    local last = redis.call('HGET', PREFIX .. 'tenant_tags:' .. queue, tenant) or '0'
    tags[queue], lines[queue] = math.max(tonumber(virtual), tonumber(last)), {}
    redis.call('SADD', PREFIX .. 'queues', queue)
  end

  local leader, images = false, false
  if identity ~= '' then
    if common.reuse then images = redis.call('GET', PREFIX .. 'finished:' .. identity) end
    leader = redis.call('GET', PREFIX .. 'in_flight:' .. identity)
    if leader and redis.call('LLEN', PREFIX .. 'followers:' .. leader) >= 1000 then
      leader, identity = false, ''  -- enough followers: this job runs on its own
    elseif not leader and not images then
      redis.call('SET', PREFIX .. 'in_flight:' .. identity, id)
    end
  end
  local stands_in_line = not (images or leader)
  if stands_in_line then tags[queue] = tags[queue] + tonumber(cost) end
  local at, tag = whole(now), whole(tags[queue])

  local fields = {'schema', SCHEMA, 'state', 'queued', 'lane', common.lane, 'queue', queue, 'tenant', tenant,
    'config', config, 'digest', digest, 'max_failures', common.max_failures, 'metadata', common.metadata,
    'created_at', at, 'queued_at', at, 'tag', tag, 'cost', cost}
  local function also(name, value)
    if value and value ~= '' then fields[#fields + 1], fields[#fields + 2] = name, value end
  end
  -- By pattern: inside a JSON string a quote is escaped, so a prompt cannot match.
  local width, height = config:match('"width":(%d+)'), config:match('"height":(%d+)')
  also('shape', width and height and width .. 'x' .. height)
  also('custom_id', custom_id)
  also('webhook', common.webhook)
  also('traceparent', common.traceparent)
  also('batch', batch)
  also('identity', identity)
  also('reusable', identity ~= '' and common.reuse and '1')
  also('images', images)
  also('leader', images and 'storage' or leader)
  redis.call('HSET', job_key(id), unpack(fields))

  if batch then
    live[#live + 1] = id
  else
    recent[#recent + 1], recent[#recent + 2] = at, id
  end
  if images then
    reused[#reused + 1] = id
  elseif leader then
    redis.call('RPUSH', PREFIX .. 'followers:' .. leader, id)
  else
    local line = lines[queue]
    line[#line + 1], line[#line + 2] = tag, id
  end
  now = now + 1  -- so that all times are distinct
end

if #live > 0 then redis.call('SADD', PREFIX .. 'live:' .. batch, unpack(live)) end
if #recent > 0 then redis.call('ZADD', PREFIX .. 'recent:' .. tenant, unpack(recent)) end
redis.call('SADD', PREFIX .. 'tenants', tenant)
redis.call('HINCRBY', PREFIX .. 'counts', 'queued', made)
if batch then redis.call('HINCRBY', PREFIX .. 'batch:' .. batch, 'queued', made) end
for queue, line in pairs(lines) do
  redis.call('HSET', PREFIX .. 'tenant_tags:' .. queue, tenant, whole(tags[queue]))
  if #line > 0 then
    redis.call('ZADD', PREFIX .. 'waiting:' .. queue, unpack(line))
    push_messages(queue, #line / 2)
  end
end
for _, id in ipairs(reused) do finish(id, 'succeeded', now, retention) end
return {'made'}
