"""Where the command starts: nothing is imported before Ctrl-C is one line."""

import sys
from typing import NoReturn

from mvit_export.cli.codes import EXIT_INTERRUPTED


def main() -> NoReturn:
    try:
        from mvit_export.cli.main import main as run

        run()
    except SystemExit as ended:
        from mvit_export.system.silent_end import end_with

        end_with(ended.code if isinstance(ended.code, int) else 0)
        raise
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("mvit-export: error: interrupted; nothing half-written was left\n")
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
