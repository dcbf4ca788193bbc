"""What the policies would do: on simulated prompts, and on the log of a run that was."""
