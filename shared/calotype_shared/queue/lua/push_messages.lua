-- Returns a message to its queue, unless there is already one per waiting job. ARGV: queue.
local queue = ARGV[1]
if redis.call('LLEN', PREFIX .. queue) < redis.call('ZCARD', PREFIX .. 'waiting:' .. queue) then push_messages(queue, 1) end
