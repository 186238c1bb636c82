"""What inspect_shards is made of: checks of samples, shards and data sets, repair, statistics, sheets, comparison."""
