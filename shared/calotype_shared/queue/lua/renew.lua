-- Renews leases. ARGV: lease in ms, then (id, attempt, token) of each job. Returns the ids of lost claims. A claim whose
-- own commit ended the job is not lost: its worker would delete the images.
local ends = whole(now_us() / 1000 + tonumber(ARGV[1]))
local lost = {}
for i = 2, #ARGV, 3 do
  if holds(ARGV[i], ARGV[i + 1], ARGV[i + 2]) then
    redis.call('ZADD', PREFIX .. 'leases', ends, ARGV[i])
  elseif not committed(ARGV[i], ARGV[i + 1], ARGV[i + 2]) then
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
