"""From files to batches: readers, sample orders, splits, transforms, collate functions."""
