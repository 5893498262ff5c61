"""The scheduler's side: which blocks a request holds, has reserved, and gives back when."""
