"""Is this cluster fit to train on? Checks of every host and of what connects them, in minutes, before a run."""
