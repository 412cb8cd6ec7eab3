"""The losses: functions on vectors that know nothing of shards or chunks."""
