"""The exit codes of the command line."""

EXIT_CODES = {"pass": 0, "fail": 1, "not-run": 3}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
