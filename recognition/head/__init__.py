"""The class-sharded head: margins, the masked sum of exponentials, the row optimizer."""
