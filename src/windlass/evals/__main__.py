"""lm-eval's command line with `--model windlass`: it finds models of other packages only where
something registers them before it reads its arguments."""

import sys

from windlass.errors import WindlassError


def main() -> int | str:
    """Runs `lm_eval` with the arguments of this process; for `sys.exit`."""
    try:
        import lm_eval.models  # noqa: F401  the harness's own, which it forgets where there is any other
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError as error:
        return f"windlass-lm-eval: {error.name} is not installed: pip install 'lm-eval[api]'"
    from windlass.evals.harness import WindlassLM

    register_model("windlass")(WindlassLM)
    try:
        cli_evaluate()
    except WindlassError as error:
        return f"windlass-lm-eval: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
