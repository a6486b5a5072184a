-- Records progress. ARGV: (id, attempt, token, step, total_steps) of each job. Lost claims write nothing.
for i = 1, #ARGV, 5 do
  if holds(ARGV[i], ARGV[i + 1], ARGV[i + 2]) then
    redis.call('HSET', job_key(ARGV[i]), 'step', ARGV[i + 3], 'total_steps', ARGV[i + 4])
    announce(ARGV[i], 'running')
  end
end
