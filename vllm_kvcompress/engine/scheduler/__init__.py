"""The scheduler's side: which blocks a request holds, is promised, and gives back when."""
