-- Ends an attempt at a webhook, unless another process has taken it. ARGV: id, attempt, ms until the next attempt or ''
-- for none. Returns 1 or 0.
local id, pause = ARGV[1], ARGV[3]
local hook = PREFIX .. 'hook:' .. id
if redis.call('HGET', hook, 'attempts') ~= ARGV[2] then return 0 end
if pause == '' then
  redis.call('DEL', hook)
  redis.call('ZREM', PREFIX .. 'hooks', id)
else
  redis.call('ZADD', PREFIX .. 'hooks', whole(now_us() / 1000 + tonumber(pause)), id)
end
return 1
