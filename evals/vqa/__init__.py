"""Visual question answering: LLaVA-1.5 on any backbone, scored on GQA, VQAv2, TextVQA and ScienceQA."""
