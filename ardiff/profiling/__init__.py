"""Where the time and the memory of training go: what `launch/profile_throughput.py` measures, models and draws."""
