"""A server that scores texts in the student's ids, in front of a teacher with another tokenizer."""
