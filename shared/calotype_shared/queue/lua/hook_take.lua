-- Takes due webhooks. Each counts an attempt and is due again after the lease, unless its outcome is recorded before.
-- ARGV: lease in ms, maximum to take, maximum at once per host, per tenant, then JSON of the caller's deliveries in
-- progress by host and by tenant. Returns {id, host, its hash as a flat list of fields and values} of each.
local lease, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local per_host, per_tenant = tonumber(ARGV[3]), tonumber(ARGV[4])
local by_host, by_tenant = cjson.decode(ARGV[5]), cjson.decode(ARGV[6])
local LOOK, KEEP, ASIDE = 256, 32, 1000
local now = now_us() / 1000
local taken, held = {}, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', PREFIX .. 'hooks', '-inf', whole(now), 'LIMIT', 0, LOOK)) do
  if #taken == most then break end
  local hook = PREFIX .. 'hook:' .. id
  local found = redis.call('HMGET', hook, 'url', 'tenant')
  local url, tenant = found[1], found[2] or ''
  if not url then
    redis.call('ZREM', PREFIX .. 'hooks', id)  -- it has expired
  else
    local host = string.lower(string.match(url, '^%a+://([^/?#]+)') or url)
    local of_host, of_tenant = by_host[host] or 0, by_tenant[tenant] or 0
    if of_host < per_host and of_tenant < per_tenant then
      by_host[host], by_tenant[tenant] = of_host + 1, of_tenant + 1
      redis.call('HINCRBY', hook, 'attempts', 1)
      redis.call('ZADD', PREFIX .. 'hooks', whole(now + lease), id)
      taken[#taken + 1] = {id, host, redis.call('HGETALL', hook)}
    else
      -- Many deliveries to one slow receiver must not block others: all but a few are postponed briefly.
      held = held + 1
      if held > KEEP then redis.call('ZADD', PREFIX .. 'hooks', whole(now + ASIDE), id) end
    end
  end
end
return taken
