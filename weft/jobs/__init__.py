"""What every process of a launched job runs, and what starts it."""
