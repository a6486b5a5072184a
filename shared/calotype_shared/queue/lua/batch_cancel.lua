-- Cancels a batch: no new job of it starts. ARGV: id. Returns its state afterwards, or nothing if it does not exist.
local batch = PREFIX .. 'batch:' .. ARGV[1]
local state = redis.call('HGET', batch, 'state')
if state == 'validating' or state == 'in_progress' then
  state = 'cancelling'
  redis.call('HSET', batch, 'state', state, 'cancelling_at', whole(now_us()))
end
return state
