"""The notebook face: Learner and ImageClassifierData."""
