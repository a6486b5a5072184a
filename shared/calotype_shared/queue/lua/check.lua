-- Whether this user may do what all other scripts do. Leaves nothing behind. Returns error messages, by what was tried.
local key, problems = PREFIX .. 'check', {}
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then problems[#problems + 1] = answer.err end
end
redis.pcall('DEL', key)
try('SET', key, '1', 'PX', '1000')
try('GET', key)
try('INCRBY', key, 1)
try('DEL', key)
try('HSET', key, 'a', '1')
try('HINCRBY', key, 'a', 1)
try('DEL', key)
try('ZADD', key, 1, 'a')
try('ZRANGEBYSCORE', key, '-inf', '+inf')
try('DEL', key)
try('SADD', key, 'a')
try('DEL', key)
try('LPUSH', key, 'a')
try('RPOP', key)
try('PUBLISH', PREFIX .. 'changed:check', '')
return problems
