"""The evaluate command and what it computes: metrics, calibration, rankings, label errors, the report; start at run.py."""
