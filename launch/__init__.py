"""Programs: training, sampling, evaluation. Run each as `python launch/NAME.py --help`."""
