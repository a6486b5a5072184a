-- Nothing new of a batch starts from here on. ARGV: id. Returns its state then, or nothing if there is no such batch.
local batch = PREFIX .. 'batch:' .. ARGV[1]
local state = redis.call('HGET', batch, 'state')
if state == 'validating' or state == 'in_progress' then
  state = 'cancelling'
  redis.call('HSET', batch, 'state', state, 'cancelling_at', whole(now_us()))
end
return state
