"""Programs that turn videos into shards; run each as `python -m data_tools.NAME --help`."""
