"""lm-eval's command line with `--model windlass`: it finds models of other packages only where
something registers them before it reads its arguments."""

import sys

from windlass.errors import WindlassError


def main() -> int | str:
    """Runs `lm_eval` with the arguments of this process; for `sys.exit`."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        return f"windlass-lm-eval: {error.name} is not installed: pip install 'lm-eval[api]'"
    from windlass.evals.harness import register

    register()
    try:
        cli_evaluate()
    except WindlassError as error:
        return f"windlass-lm-eval: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
