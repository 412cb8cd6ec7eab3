"""The class-sharded head: margins, the masked sum of exponentials, the row optimizer."""

from recognition.head.sharded_softmax import HeadOutput, ShardedSoftmax

__all__ = ["HeadOutput", "ShardedSoftmax"]
