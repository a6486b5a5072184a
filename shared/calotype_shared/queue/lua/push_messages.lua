-- Gives a message back to its queue. ARGV: queue. None is needed where each waiting job has one already.
local queue = ARGV[1]
if redis.call('LLEN', PREFIX .. queue) < redis.call('ZCARD', PREFIX .. 'waiting:' .. queue) then push_messages(queue, 1) end
