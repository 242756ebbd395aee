"""Other engines' own extension points, filled with a teacher that has another tokenizer."""
