"""JSON over HTTP to a server of models, for teachers and rollouts alike."""
