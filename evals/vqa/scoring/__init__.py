"""What an answer is worth: the rules of GQA, VQAv2, TextVQA and ScienceQA, from their public files."""
