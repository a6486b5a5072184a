-- Consumes one request, and images, from an API key's limits. ARGV: key id, requests per minute or '', images per day
-- or '', images of this request. Returns 0 on success; else microseconds to wait, and nothing was consumed.
local rate_limit, now = PREFIX .. 'rate_limit:' .. ARGV[1], now_us()
local per_minute, per_day, images = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local found = redis.call('HMGET', rate_limit, 'left', 'at', 'day', 'made')
local changes = {}
if per_minute then  -- a token bucket with the capacity of one minute
  local left = math.min(per_minute, tonumber(found[1] or per_minute) + (now - tonumber(found[2] or now)) * per_minute / 6e7)
  if left < 1 then return math.ceil((1 - left) * 6e7 / per_minute) end
  changes = {'left', string.format('%.6f', left - 1), 'at', whole(now)}
end
if per_day and images ~= 0 then  -- per calendar day, UTC; a negative number is a refund
  local day = math.floor(now / 8.64e10)
  local made = found[3] == whole(day) and tonumber(found[4]) or 0
  if made + images > per_day then return math.ceil((day + 1) * 8.64e10 - now) end
  for _, value in ipairs({'day', whole(day), 'made', whole(math.max(0, made + images))}) do changes[#changes + 1] = value end
end
if #changes > 0 then
  redis.call('HSET', rate_limit, unpack(changes))
  redis.call('PEXPIRE', rate_limit, 86400000)
end
return 0
