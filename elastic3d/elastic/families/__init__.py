"""Block families: how each kind of block is called, cut to a sub-batch, narrowed and counted."""
