-- Changes a batch's state; besides cancel, nothing else does. ARGV: id, fence, expected state, new state, retention in
-- seconds, then fields and values to set. Returns 1, or 0 if the fence or the state has changed.
local id, fence, from, to, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local batch, now = PREFIX .. 'batch:' .. id, now_us()
local found = redis.call('HMGET', batch, 'state', 'fence', 'tenant', 'webhook')
if found[1] ~= from or found[2] ~= fence then return 0 end
redis.call('HSET', batch, 'state', to, to .. '_at', whole(now), unpack(ARGV, 6))
if to == 'completed' or to == 'failed' or to == 'expired' or to == 'cancelled' then
  local lasts = whole(tonumber(retention) * 1000)
  redis.call('ZREM', PREFIX .. 'open_batches', id)
  redis.call('DEL', PREFIX .. 'leader:' .. id, PREFIX .. 'live:' .. id, PREFIX .. 'done:' .. id, PREFIX .. 'parts:' .. id)
  redis.call('PEXPIRE', batch, lasts)
  if found[4] then enqueue_webhook(id, found[4], 'batch.' .. to, found[3], now) end
end
return 1
