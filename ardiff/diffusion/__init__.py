"""The diffusion process: schedule, training timesteps, objective."""
