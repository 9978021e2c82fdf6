"""The themes of tests/distributed/test_localize.py: scenarios of several processes, and what they must return."""
