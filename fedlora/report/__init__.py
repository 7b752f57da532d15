"""The run log, and the pages that people read."""
