-- Accepts a batch. ARGV: id, tenant, retention in seconds, limit of open batches, limit per tenant, idempotency key or
-- '', hash of the request, then fields and values of its record. Returns the id and the request, or those of the batch
-- for which the key was used first; or {'full', 'tenant' or 'all', open batches, limit}.
local id, tenant, retention, most, most_of_tenant, key, request = unpack(ARGV, 1, 7)
local known = PREFIX .. 'idempotency:' .. tenant .. ':' .. key
if key ~= '' then
  local found = redis.call('HMGET', known, 'id', 'request')
  if found[1] then return {found[1], found[2]} end
end
if redis.call('EXISTS', PREFIX .. 'batch:' .. id) == 1 then return {id, request} end  -- accepted before; its response was lost
local open, own = redis.call('ZRANGE', PREFIX .. 'open_batches', 0, -1), 0
for _, other in ipairs(open) do
  if redis.call('HGET', PREFIX .. 'batch:' .. other, 'tenant') == tenant then own = own + 1 end
end
if own >= tonumber(most_of_tenant) then return {'full', 'tenant', whole(own), most_of_tenant} end
if #open >= tonumber(most) then return {'full', 'all', whole(#open), most} end
if key ~= '' then
  redis.call('HSET', known, 'id', id, 'request', request)
  redis.call('PEXPIRE', known, whole(tonumber(retention) * 1000))
end
local now, batch = now_us(), PREFIX .. 'batch:' .. id
redis.call('HSET', batch, 'schema', SCHEMA, 'state', 'validating', 'tenant', tenant, 'created_at', whole(now), 'fence', '0',
  'cursor', '0:0', unpack(ARGV, 8))
local expires = redis.call('HGET', batch, 'expires_after')
if expires then redis.call('HSET', batch, 'expires_at', whole(now + tonumber(expires) * 1000000)) end
redis.call('ZADD', PREFIX .. 'batches:' .. tenant, whole(now), id)
redis.call('ZADD', PREFIX .. 'open_batches', whole(now), id)
redis.call('SADD', PREFIX .. 'tenants', tenant)
return {id, request}
