"""The worker's side of one step."""
