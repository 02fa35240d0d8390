"""The export command, the artefact, and the classifier that reads it; start at artifact.py."""
