"""A run as it goes on: its numbers, its completions under the eye, and what it leaves behind for people."""
