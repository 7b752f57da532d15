"""Local training of one client on the resident base."""
