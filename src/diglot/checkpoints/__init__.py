"""Nothing lost: checkpoints that are whole and of their run, and batches that can be run again."""
