"""Training: loss, expert balance, optimizer, schedule, step, loop, and the record of a run."""
