"""Starting the processes of a job, watching over them, and ending them together."""
