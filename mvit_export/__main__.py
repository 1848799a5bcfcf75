"""Where the command starts: nothing is imported before Ctrl-C is one line."""

import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> NoReturn:
    try:
        from mvit_export.cli.main import main as run

        run()
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("mvit-export: error: interrupted; nothing half-written was left\n")
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
