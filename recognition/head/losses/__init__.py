"""Losses over classes and on embeddings: functions of vectors that know nothing of shards or chunks."""
