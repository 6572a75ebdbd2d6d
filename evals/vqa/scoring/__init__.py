"""Scoring of answers by the rules of GQA, VQAv2, TextVQA and ScienceQA, from their public files."""
