-- Notes how far jobs are. ARGV: (id, attempt, step, total_steps) of each. Attempts that lost their job write nothing.
for i = 1, #ARGV, 4 do
  if holds(ARGV[i], ARGV[i + 1]) then
    redis.call('HSET', job_key(ARGV[i]), 'step', ARGV[i + 2], 'total_steps', ARGV[i + 3])
  end
end
