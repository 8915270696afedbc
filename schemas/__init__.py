"""What is written down and passed around: job spec, token file, ledger, manifest, failures, errors."""
