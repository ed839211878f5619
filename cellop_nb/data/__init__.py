"""AnnData in, tensors out: the data contract, splits, groups, and data sets."""
