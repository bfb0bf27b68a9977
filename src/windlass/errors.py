"""Errors that users see. Each message says what, what was got, and what is allowed.

WindlassError
    UsageError          a flag, parameter or file the user gave
    ModelError          config.json asks for something Windlass does not run
    CheckpointError     weight files: missing, misshaped, truncated, vanished
    BudgetError         a memory budget that cannot work; says the smallest that does
    RequestError        one request is bad; the others go on
    JobError            a batch job: its files, its journal, another job's output
"""


class WindlassError(Exception):
    """Base of all errors that are reported to the user without a traceback."""


class UsageError(WindlassError):
    """A flag, parameter or file given by the user is wrong."""


class ModelError(WindlassError):
    """`config.json` describes a model that Windlass does not run."""


class CheckpointError(WindlassError):
    """The checkpoint's files do not hold what the model needs."""


class BudgetError(WindlassError):
    """The memory budget cannot work."""


class JobError(WindlassError):
    """A batch job cannot start or go on."""


class RequestError(WindlassError):
    """One request is bad. `param` names the field, `code` is OpenAI's error code or None."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
