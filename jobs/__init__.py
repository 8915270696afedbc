"""Running it: command line, driver, runners, ledger writer, lease."""
