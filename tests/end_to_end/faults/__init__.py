"""Faults of every kind in the middle of training; afterwards the same command must give the undisturbed run."""
