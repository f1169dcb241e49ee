"""From files to batches: readers, orders, splits, transforms, collate functions."""
