"""Teaching ladders: an op or a step from the plainest code to what the engine does, a file for every rung."""
