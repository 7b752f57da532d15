"""What protects single updates: secure sums, differential privacy that is counted, and an audit that attacks them."""
